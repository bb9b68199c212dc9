"""The finished folder on the HuggingFace Hub: may we push there, and the push itself.

The token goes into request headers and nowhere else; every message of the library is cleaned of it.
"""

from __future__ import annotations

import logging
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

from llm.config.errors import UserError
from llm.hub.connection import come_online, hub_is_reachable

log = logging.getLogger(__name__)

# What someone else needs to load, judge and cite the model; not the run's logs, paths and
# checkpoints.
FINISHED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "all_results.json",
    "curves.png",
)
RUN_FILES = (
    *("checkpoints/*", "tensorboard/*", "unverified/*", "config.toml", "status.json", "metrics.jsonl", "log.txt"),
    *("run.lock", ".*"),
)

_LOGIN = "set HF_TOKEN, pass --hub_token, or run `hf auth login`"
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# The Hub's own rule for an owner or a repository: no two of - and . in a row, none at the ends.
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def check_hub_access(hub_model_id: str | None, output_dir: Path, token: str | None) -> str | None:
    """Finds out early whether `push_folder` could work at the end, and creates the repository.

    Creating it (nothing happens where it exists) is the one way to learn that the token may write
    there.

    Returns:
        The repository's full name, or None where the Hub did not answer (said in a warning).

    Raises:
        UserError: no token, a token that is refused or may not write, an impossible repository
            name.
    """
    token = _require_token(token)
    _check_name(_name_of(hub_model_id, output_dir))
    try:
        if not hub_is_reachable():
            raise ConnectionError("no answer")
        repo_id = resolve_repo_id(hub_model_id, output_dir, token)
        HfApi(token=token).create_repo(repo_id, exist_ok=True)
    except UserError:
        raise
    except Exception as error:
        if refusal := _refusal(error, token):
            raise UserError(f"--push_to_hub: {refusal}") from None
        log.warning(
            "the Hub cannot be reached now (%s); the push at the end will be tried all the same",
            _one_line(error, token),
        )
        return None
    return repo_id


def resolve_repo_id(hub_model_id: str | None, output_dir: Path, token: str | None) -> str:
    """The repository's full name, ``owner/name``; asks the Hub for the owner where none is given.

    Raises:
        UserError: no token, or an impossible name.
        Exception: whatever huggingface_hub raises when it cannot ask.
    """
    name = _name_of(hub_model_id, output_dir)
    _check_name(name)
    if "/" in name:
        return name
    return f"{HfApi(token=_require_token(token)).whoami()['name']}/{name}"


def push_folder(
    folder: Path,
    repo_id: str | None,
    token: str | None,
    *,
    commit_message: str = "Upload the trained model",
) -> str:
    """Uploads the finished files of a run's folder in one commit: all of them appear, or none.

    Args:
        folder: a run's folder; of it, `FINISHED_FILES` alone are uploaded.
        repo_id: ``owner/name``, ``name`` of a repository of the token's owner, or None: the
            folder's name.
        token: access token; None for HF_TOKEN or the one of ``hf auth login``.

    Returns:
        The address of the model's page.

    Raises:
        UserError: the push failed; the message names the cause and the command that pushes again.
    """
    secret = token or ""
    try:
        secret = _require_token(token)
        paths = finished_files(folder)
        come_online()  # the network may be back since the start of the run
        if not hub_is_reachable(timeout_seconds=10.0):
            raise UserError(f"no answer from {constants.ENDPOINT}")
        full_name = repo_id = resolve_repo_id(repo_id, folder, secret)
        api = HfApi(token=secret)
        url = str(api.create_repo(full_name, exist_ok=True))
        additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        api.create_commit(full_name, additions, commit_message=commit_message)
    except Exception as error:
        if isinstance(error, UserError):
            cause = str(error)
        else:
            cause = _refusal(error, secret) or _one_line(error, secret)
        raise UserError(
            f"the push to the Hub failed: {cause}; "
            f"the finished folder is kept, push it with: {push_command(folder, repo_id)}"
        ) from None
    log.info("pushed to %s", url)
    return url


def finished_files(folder: Path) -> list[Path]:
    """The files of a run's folder that belong on the Hub, sorted by name.

    Raises:
        UserError: there is no model in it.
    """
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in FINISHED_FILES)
    )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"{folder} holds no weights (model.safetensors)")
    return paths


def push_command(folder: Path, repo_id: str | None) -> str:
    """The shell command that uploads the same files by hand."""
    excludes = [word for pattern in RUN_FILES for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo_id or _name_of(None, folder), str(folder), ".", *excludes])


def _name_of(hub_model_id: str | None, output_dir: Path) -> str:
    return hub_model_id or output_dir.resolve().name


def _check_name(name: str) -> None:
    parts = name.split("/")
    good = len(parts) <= 2 and len(name) <= 96 and all(_NAME.fullmatch(part) for part in parts)
    if not good or name.endswith(".git"):
        raise UserError(
            f"{name!r} cannot name a Hub repository (letters and digits, single - _ . between "
            "them, at most 96): give --hub_model_id such as me/my-gpt"
        )


def _require_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise UserError(f"--push_to_hub needs an access token: {_LOGIN}")
    return token


def _refusal(error: BaseException, token: str) -> str | None:
    """What a person can do about a refusal of the Hub; None where it is not one, but a failure."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the Hub does not know the access token; {_LOGIN}"
    if status == 403:
        return f"the access token may not write there; make one that may at {_TOKENS_PAGE}"
    if status == 404:
        return "the Hub knows no such repository or owner; check --hub_model_id"
    if status in (408, 429) or not isinstance(status, int) or not 400 <= status < 500:
        return None
    return f"the Hub refused it: {_one_line(error, token)}"


def _one_line(error: BaseException, token: str) -> str:
    """The innermost message on one line, without the token (nor anything that looks like one)."""
    while error.__cause__ is not None and not str(error).strip():
        error = error.__cause__
    line = " ".join(str(error).split()) or type(error).__name__
    if token:
        line = line.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", line)[:300]
