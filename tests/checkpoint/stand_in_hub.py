"""A small stand-in of the Hugging Face hub's HTTP interface, with faults on demand; as a script it serves folders.

It has what huggingface_hub asks for when it downloads: a model's commit and files, HEAD and GET of files with ETag,
X-Repo-Commit and ranges, large files redirected to another host as to a CDN, and the errors' X-Error-Code.

    python stand_in_hub.py [--port N] OWNER/NAME=FOLDER ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

GOOD_TOKEN = "hf_good"
OTHER_TOKEN = "hf_without_access"
LARGE = (".safetensors", ".bin", ".gguf", ".pth")
_CHUNK = 64 * 1024


@dataclass
class File:
    """One file of a commit."""

    data: bytes
    is_large: bool
    etag: str

    @classmethod
    def of(cls, name: str, data: bytes) -> File:
        """Large files have a sha256, small ones git's sha1."""
        if name.endswith(LARGE):
            return cls(data, True, hashlib.sha256(data).hexdigest())
        return cls(data, False, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@dataclass
class Repository:
    """Its commits, oldest first, and what its branches and tags stand for."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], *revisions: str) -> str:
        """Add a commit with these files; `revisions` (main, if none) now stand for it. Its hash."""
        described = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}{described}".encode()).hexdigest()
        self.commits[sha] = {name: File.of(name, data) for name, data in files.items()}
        self.revisions.update(dict.fromkeys(revisions or ("main",), sha))
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests for the contents of a file."""

    after: int | None = None
    """Cut the connection after so many bytes of the answer."""
    status: int | None = None
    retry_after: str | None = None
    damage: bool = False
    """Change a byte in the middle."""
    no_ranges: bool = False
    """Send all of it, whatever was asked for."""
    hang_s: float = 0.0
    """Say nothing for so long."""
    times: int = 1


@dataclass
class Request:
    """One that came."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None


class StandInHub:
    """Repositories by id, faults by file name, and a record of the requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.slow_bytes_per_s: float | None = None
        self.down = False
        """Every request is answered 503."""
        self._server: ThreadingHTTPServer | None = None
        self._lock = threading.Lock()

    def repository(self, model_id: str) -> Repository:
        return self.repositories.setdefault(model_id, Repository())

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[StandInHub]:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def gets(self, name: str) -> list[Request]:
        """The requests for a file's contents."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}")]

    def counts(self) -> Counter[str]:
        """How often each file's contents were asked for."""
        return Counter(r.path.rsplit("/", 1)[-1] for r in self.requests if r.method == "GET" and "/cdn/" in r.path)

    def take_fault(self, name: str) -> Fault | None:
        with self._lock:
            fault = self.faults.get(name)
            if fault is None or fault.times <= 0:
                return None
            fault.times -= 1
            return fault


class _Refused(Exception):
    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        host = (self.headers.get("Host") or "").split(":")[0]
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, host, self.headers.get("Range"), given))
        try:
            if self.hub.down:
                raise _Refused(503, None, "Service Unavailable")
            if given not in (None, GOOD_TOKEN, OTHER_TOKEN):
                raise _Refused(401, None, "Invalid credentials in Authorization header")
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
                self._tree(*found.groups(), given)
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._info(found[1], found[2] or "main", "blobs" in parse_qs(url.query), given)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(*found.groups(), given)
            elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                self._cdn(*found.groups(), given)
            else:
                raise _Refused(404, None, "no such page")
        except _Refused as e:
            self._refuse(e)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _files(self, model_id: str, revision: str, given: str | None) -> tuple[Repository, str, dict[str, File]]:
        repository = self.hub.repositories.get(model_id)
        if repository is None or (repository.private and given != GOOD_TOKEN):
            # As the real hub: without a token it does not tell whether there is something to hide
            if given is None:
                raise _Refused(401, "RepoNotFound", "Invalid username or password.")
            raise _Refused(404, "RepoNotFound", "Repository not found")
        commit = repository.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit, repository.commits[commit]

    def _info(self, model_id: str, revision: str, with_blobs: bool, given: str | None) -> None:
        repository, commit, files = self._files(model_id, revision, given)
        siblings = []
        for name, file in sorted(files.items()):
            sibling: dict[str, Any] = {"rfilename": name}
            if with_blobs:
                sibling |= self._blob(file)
            siblings.append(sibling)
        self._json({"_id": "0", "id": model_id, "modelId": model_id, "sha": commit, "private": repository.private,
                    "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0,
                    "siblings": siblings})  # fmt: skip

    def _tree(self, model_id: str, revision: str, given: str | None) -> None:
        _, _, files = self._files(model_id, revision, given)
        self._json([{"type": "file", "path": name, "oid": file.etag[:40], "size": len(file.data)}
                    | ({"lfs": self._lfs(file)} if file.is_large else {})
                    for name, file in sorted(files.items())])  # fmt: skip

    def _blob(self, file: File) -> dict[str, Any]:
        told: dict[str, Any] = {"size": len(file.data), "blobId": file.etag[:40]}
        return told | ({"lfs": self._lfs(file)} if file.is_large else {})

    def _lfs(self, file: File) -> dict[str, Any]:
        names = ("sha256", "oid")  # the model's page and the tree call it differently
        return dict.fromkeys(names, file.etag) | {"size": len(file.data), "pointerSize": 134}

    def _resolve(self, model_id: str, revision: str, name: str, given: str | None) -> None:
        repository, commit, files = self._files(model_id, revision, given)
        if repository.gated and given is None:
            raise _Refused(401, "GatedRepo", f"Access to model {model_id} is restricted. Please log in.")
        if repository.gated and given != GOOD_TOKEN:
            raise _Refused(403, "GatedRepo", f"Access to model {model_id} is restricted.")
        if name not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        file = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not file.is_large:
            self._contents(name, file, headers)
            return
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data)), "ETag": '"pointer"'}
        # Another host name, as a CDN has: the token must not go there
        headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{model_id}/{commit}/{name}"
        self._answer(302, headers, b"Found")

    def _cdn(self, model_id: str, commit: str, name: str, given: str | None) -> None:
        if given is not None:
            raise _Refused(400, None, "a token came to the CDN")
        file = self.hub.repositories[model_id].commits[commit][name]
        self._contents(name, file, {"ETag": '"of-the-cdn"', "Accept-Ranges": "bytes"})

    def _contents(self, name: str, file: File, headers: dict[str, str]) -> None:
        fault = self.hub.take_fault(name) if self.command == "GET" else None
        fault = fault or Fault()
        if fault.hang_s:
            time.sleep(fault.hang_s)
        if fault.status is not None:
            self._answer(fault.status, {"Retry-After": fault.retry_after} if fault.retry_after else {}, b"")
            return
        data, status, start = file.data, 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and not fault.no_ranges:
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault.damage:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self._answer(status, headers, data[start:], fault.after)

    def _json(self, value: Any) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, refused: _Refused) -> None:
        headers = {"X-Error-Message": refused.message}
        if refused.code is not None:
            headers["X-Error-Code"] = refused.code
        self._answer(refused.status, headers, json.dumps({"error": refused.message}).encode())

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, cut_after: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body if cut_after is None else body[:cut_after]
        for i in range(0, len(sent), _CHUNK):
            self.wfile.write(sent[i : i + _CHUNK])
            if self.hub.slow_bytes_per_s is not None:
                time.sleep(_CHUNK / self.hub.slow_bytes_per_s)
        if cut_after is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve folders as models of a Hugging Face hub.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("models", nargs="+", metavar="OWNER/NAME=FOLDER")
    arguments = parser.parse_args()
    hub = StandInHub()
    for model in arguments.models:
        model_id, folder = model.split("=", 1)
        root = Path(folder)
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        hub.repository(model_id).commit(files)
    with hub.serving(arguments.port):
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
