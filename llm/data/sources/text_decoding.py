"""Read a file's text a megabyte at a time: decompress it, check it, and decode it from UTF-8."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

from llm.config.errors import UserError
from llm.data.sources.files import TextFile

CHUNK_BYTES = 1 << 20


def read_text(file: TextFile) -> Iterator[str]:
    """Yield the file's text in chunks of about a megabyte; line ends stay, a byte order mark is dropped.

    Raises:
        UserError: the file cannot be read, its compression is broken, it holds a NUL byte (which text does not), it is
            not UTF-8, or it is empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    is_empty = True
    for data in _bytes(file):
        nul = data.find(0)
        if nul >= 0:
            raise UserError(
                f"{file.path}: not a text file (NUL byte at byte {_position(file, offset + nul)}); name a text file"
            )
        chunk = _decode(file, decoder, data, offset)
        if offset == 0:
            chunk = chunk.removeprefix("\ufeff")
        offset += len(data)
        if chunk:
            is_empty = False
            yield chunk
    _decode(file, decoder, b"", offset, final=True)
    if is_empty:
        raise UserError(f"{file.path}: is empty; name a file that holds text")


def split_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Join chunks and split them after every newline, and nowhere else (for example not at U+2028)."""
    pending: list[str] = []
    for chunk in chunks:
        complete, newline, rest = chunk.rpartition("\n")
        if not newline:
            pending.append(rest)
            continue
        text = "".join([*pending, complete])
        pending = [rest]
        for line in text.split("\n"):
            yield line + "\n"
    if last := "".join(pending):
        yield last


def _decode(
    file: TextFile,
    decoder: codecs.IncrementalDecoder,
    data: bytes,
    offset: int,
    *,
    final: bool = False,
) -> str:
    num_pending = len(decoder.getstate()[0])  # bytes of a character that the previous data ended inside of
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        position = _position(file, offset - num_pending + error.start)
        raise UserError(
            f"{file.path}: not UTF-8 (byte {position}); convert it, such as with `iconv -f LATIN1 -t UTF-8`"
        ) from None


def _position(file: TextFile, offset: int) -> str:
    return f"{offset} of the decompressed text" if file.compression else str(offset)


def _bytes(file: TextFile) -> Iterator[bytes]:
    """Yield the decompressed bytes in chunks of `CHUNK_BYTES`."""
    try:
        with _open(file) as stream:
            while data := stream.read(CHUNK_BYTES):
                yield data
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _broken(file, error) from None
    except OSError as error:
        if error.errno is None:  # bz2 and Zstandard report broken data this way
            raise _broken(file, error) from None
        raise UserError(f"{file.path}: cannot be read ({error.strerror}); check its permissions and its disk") from None


def _broken(file: TextFile, error: Exception) -> UserError:
    return UserError(f"{file.path}: broken .{file.compression} file ({error}); download or compress it again")


def _open(file: TextFile) -> BinaryIO:
    match file.compression:
        case "gz":
            return cast(BinaryIO, gzip.open(file.path, "rb"))
        case "bz2":
            return cast(BinaryIO, bz2.open(file.path, "rb"))
        case "xz":
            return cast(BinaryIO, lzma.open(file.path, "rb"))
        case "zst":
            return _open_zstandard(file)
        case _:
            return file.path.open("rb")


def _open_zstandard(file: TextFile) -> BinaryIO:
    """Open a Zstandard file with pyarrow, which is installed anyway to read Parquet."""
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{file.path}: this pyarrow cannot read Zstandard; decompress the file with `zstd -d`")
    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(file.path)), "zstd"))
