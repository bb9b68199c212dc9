"""A stand-in for the Hub on 127.0.0.1: the HTTP requests that uploads of models and streams of datasets need.

Uploads arrive in `StandInHub.files`; `StandInHub.datasets` are served without a token; `StandInHub.fail` makes one
kind of request fail. With HF_ENDPOINT set to `endpoint` and HF_HUB_DISABLE_XET=1 before huggingface_hub is imported,
the library uses it as the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standInTokenThatMustAppearNowhere"
USER = "someone"
REVISION = "d" * 40
LARGE_SUFFIXES = (".safetensors", ".png", ".bin")


class StandInHub:
    """State of the server: repositories, their files, and all requests."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.token = TOKEN
        self.user = USER
        self.files: dict[str, bytes] = {}  # "someone/my-gpt/config.json": content
        self.repositories: list[str] = []
        self.requests: list[str] = []  # "POST /api/repos/create"
        self.fail: dict[str, int] = {}  # part of "METHOD /path": HTTP status of the answer
        self.datasets: dict[str, dict[str, bytes]] = {}  # "someone/words": {"train.jsonl": content}
        self.hold: str | None = None  # part of the path of a file whose answer waits until `close`
        self._is_closed = Event()
        self._large: dict[str, bytes] = {}  # by sha256

    def answer(self, method: str, path: str, body: bytes, authorized: bool) -> tuple[int, Any]:
        """Return the HTTP status and the answer (JSON, or the bytes of a file) of one request."""
        request = f"{method} {path}"
        self.requests.append(request)
        for part, status in self.fail.items():
            if part in request:
                return status, {"error": "requested by the test"}
        if path.startswith("/large/") and method == "PUT":  # a storage server, to which no token is sent
            self._large[path.removeprefix("/large/")] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        for name, files in self.datasets.items():
            if path.startswith(f"/api/datasets/{name}"):
                return 200, self._describe(name, files, path, body)
            if path.startswith(f"/datasets/{name}/resolve/"):
                if method == "GET" and self.hold is not None and self.hold in path:
                    self._is_closed.wait()
                content = files.get(unquote(path.split("/resolve/")[1].split("/", 1)[1]))
                return (404, {"error": "Entry not found"}) if content is None else (200, content)
        if method == "HEAD":
            return (200 if path in ("", "/") else 404), {}
        if not authorized:
            return 401, {"error": "Invalid credentials in Authorization header"}
        return self._answer_authorized(path, json.loads(body.split(b"\n")[0] or b"{}"), body)

    def _answer_authorized(self, path: str, request: dict[str, Any], body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON answer of a request that needs a token; `request` is the parsed body."""
        if path == "/api/whoami-v2":
            return 200, {
                "type": "user",
                "name": self.user,
                "auth": {"accessToken": {"role": "write"}},
            }
        if path == "/api/repos/create":
            repository = f"{request.get('organization') or self.user}/{request['name']}"
            url = f"{self.endpoint}/{repository}"
            if repository in self.repositories:
                return 409, {"error": "You already created this model repo", "url": url}
            self.repositories.append(repository)
            return 200, {"url": url}
        if "/preupload/" in path:
            return 200, {"files": [self._upload_mode(file["path"]) for file in request["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._upload_urls(o) for o in request["objects"]],
            }
        if path == "/verify":
            content = self._large[request["oid"]]
            is_good = hashlib.sha256(content).hexdigest() == request["oid"] and len(content) == request["size"]
            return (200 if is_good else 422), {}
        if "/commit/" in path:
            repository = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in body.splitlines():
                self._commit(repository, json.loads(line))
            url = f"{self.endpoint}/{repository}/commit/{'c' * 40}"
            return 200, {"commitUrl": url, "commitOid": "c" * 40, "success": True}
        return 404, {"error": "not found"}

    def close(self) -> None:
        """Answer the requests that wait because of `hold`."""
        self._is_closed.set()

    def _describe(self, name: str, files: dict[str, bytes], path: str, body: bytes) -> Any:
        """Return the Hub's JSON description of a dataset, or of some of its files."""
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in files.items()
        ]
        if "/paths-info/" in path:
            paths = parse_qs(body.decode()).get("paths", []) if b"=" in body[:6] else json.loads(body)["paths"]
            return [entry for entry in entries if entry["path"] in paths]
        if "/tree/" in path:
            return entries
        siblings = [{"rfilename": file} for file in files]
        return {"id": name, "sha": REVISION, "private": False, "siblings": siblings, "tags": [], "downloads": 0}

    def _upload_mode(self, path: str) -> dict[str, Any]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LARGE_SUFFIXES) else "regular",
            "shouldIgnore": False,
        }

    def _upload_urls(self, large: dict[str, Any]) -> dict[str, Any]:
        actions = {
            "upload": {"href": f"{self.endpoint}/large/{large['oid']}"},
            "verify": {"href": f"{self.endpoint}/verify"},
        }
        return {"oid": large["oid"], "size": large["size"], "actions": actions}

    def _commit(self, repository: str, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.files[f"{repository}/{value['path']}"] = self._large[value["oid"]]


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """Yield a running stand-in Hub on a free port."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
            status, answer = hub.answer(self.command, urlsplit(self.path).path, body, authorized)
            if isinstance(answer, bytes):
                content = answer
            else:
                content = b"" if self.command == "HEAD" else json.dumps(answer).encode()
            byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            self.send_response(206 if byte_range and status == 200 else status)
            if byte_range:
                first = int(byte_range[1])
                last = min(int(byte_range[2] or len(content) - 1), len(content) - 1)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                content = content[first : last + 1]
            if isinstance(answer, bytes):
                self.send_header("ETag", hashlib.sha1(answer).hexdigest())
                self.send_header("X-Repo-Commit", REVISION)
                self.send_header("Accept-Ranges", "bytes")
            elif status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header(
                "Content-Length", str(0 if self.command == "HEAD" and isinstance(answer, dict) else len(content))
            )
            self.end_headers()
            # A client that waited too long for a file has closed its connection.
            if self.command != "HEAD":
                with suppress(ConnectionError):
                    self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.close()
        server.shutdown()
        server.server_close()
