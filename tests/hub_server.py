"""A small Hub on this machine: the HTTP protocol that huggingface_hub speaks to pull and push models.

Repositories are in memory. A test may cut answers short, make requests fail and look at what was asked.

Source:
    huggingface_hub 2.4 (``hf_api``, ``_commit_api``, ``lfs``, ``file_download``) and git-lfs' batch API.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes from which a file is pushed by git-lfs' protocol
Files = dict[str, bytes]


@dataclass
class Repo:
    """One repository: its commits, its branches and who may see it."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool | None = None
    gated: bool = False

    def commit(self, branch: str, files: Files, message: str) -> str:
        sha = hashlib.sha1(repr((sorted(files.items()), message)).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: Repositories by name.
        requests: What was asked: method, path and range.
        cuts: How many more times the body of a file is cut in half, by its path.
        failures: How many more times a request for a path is answered with status 503.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, **facts: Any) -> str:
        """Put a folder into a repository, and return the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repos.setdefault(name, Repo(**facts)).commit("main", files, "first")

    def downloads(self) -> list[str]:
        """Return the files whose content was asked for."""
        return [p.split("/", 5)[5] for m, p, _ in self.requests if m == "GET" and "/resolve/" in p]


@dataclass
class _RefusedError(Exception):
    status: int
    says: str
    code: str
    headers: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        try:
            self._check(path)
            request = f"{'GET' if self.command == 'HEAD' else self.command} {path}"
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, request):
                    method(self, body, **found.groupdict())
                    return
            raise _RefusedError(404, "no such route", "")
        except _RefusedError as refusal:
            says = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.says}
            self._answer(refusal.status, b"", says | refusal.headers)

    def _check(self, path: str) -> None:
        if self.command != "HEAD" and self.server.failures[path] > 0:
            self.server.failures[path] -= 1
            raise _RefusedError(503, "busy", "")
        needs_login = self.command == "POST"  # the address of an upload is a permission in itself
        if needs_login and self.headers.get("Authorization") != "Bearer hf_test":
            raise _RefusedError(401, "Unauthorized", "")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None:
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        if repo.gated:
            raise _RefusedError(403, "Access to this model is restricted", "GatedRepo")
        return repo

    def _commit_at(self, name: str, revision: str) -> tuple[str, Files]:
        repo = self._repo(name)
        if (sha := repo.at(revision)) is None:
            raise _RefusedError(404, "Revision not found", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _info(self, _body: bytes, name: str, revision: str = "main") -> None:
        sha, files = self._commit_at(name, revision)
        siblings = [{"rfilename": path} for path in files]
        is_private = bool(self._repo(name).private)
        self._json({"id": name, "sha": sha, "siblings": siblings, "private": is_private, "tags": []})

    def _tree(self, _body: bytes, name: str, revision: str) -> None:
        self._json([_entry(path, data) for path, data in self._commit_at(name, revision)[1].items()])

    def _file(self, _body: bytes, name: str, revision: str, file: str) -> None:
        sha, files = self._commit_at(name, revision)
        if (data := files.get(file)) is None:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        entry = _entry(file, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.command == "GET" and self.server.cuts[file] > 0
        self.server.cuts[file] -= cut
        self._answer(206 if start else 200, data[start:], headers, cut=cut)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            self._json({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            return
        visibility = asked.get("visibility")
        private = asked.get("private") if visibility is None else visibility == "private"
        repo = self.server.repos[name] = Repo(private=private)
        repo.commit("main", {".gitattributes": b"*.onnx filter=lfs\n"}, "initial commit")
        self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _branch(self, _body: bytes, name: str, branch: str) -> None:
        branches = self._repo(name).branches
        status = 409 if branch in branches else 200
        branches.setdefault(branch, branches["main"])
        self._json({}, status)

    def _validate(self, _body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, **_: str) -> None:
        modes = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if asked["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for asked in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def _batch(self, body: bytes, **_: str) -> None:
        objects: list[dict[str, Any]] = json.loads(body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.server.uploads:
                asked["actions"] = {"upload": {"href": f"{self.server.url}/upload/{asked['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.uploads[oid] = body
        self._json({})

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        repo, message = self._repo(name), ""
        files = dict(repo.commits[repo.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files, message)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, Any], ...] = (
    (rf"GET /{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler._file),
    (rf"GET /api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler._tree),
    (rf"GET /api/models/{_NAME}/revision/(?P<revision>[^/]+)", _Handler._info),
    (rf"GET /api/models/{_NAME}", _Handler._info),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>[^/]+)", _Handler._branch),
    (rf"POST /api/models/{_NAME}/preupload/(?P<branch>[^/]+)", _Handler._preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /upload/(?P<oid>[0-9a-f]{64})", _Handler._upload),
    (rf"POST /api/models/{_NAME}/commit/(?P<branch>[^/]+)", _Handler._commit),
)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """Return what the Hub says of a file in a listing."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if len(data) >= LARGE:
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve an empty Hub while the body runs."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
