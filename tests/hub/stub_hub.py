"""A hub on localhost that speaks the endpoints with which models are pushed and loaded.

Faults are planned in advance: `fail(method, part_of_path, status, times)` answers so many requests
with a status; status 0 breaks the connection off in the middle.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)


@dataclass
class Repo:
    """Branches to files, files to bytes."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.branches.items():
            if revision in (name, sha_of(files)):
                return files
        return None


def sha_of(files: dict[str, bytes]) -> str:
    listed = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
    return hashlib.sha1(repr(listed).encode()).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class StubHub:
    """State of the hub, and what was asked of it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[list[Any]] = field(default_factory=list)

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        self.faults.append([method, path, status, times])

    def count(self, method: str, path: str) -> int:
        return sum(m == method and path in p for m, p in self.requests)


@contextlib.contextmanager
def stub_hub() -> Iterator[StubHub]:
    """The hub, while the block runs."""
    hub = StubHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((method, path))
        for fault in self.state.faults:
            if fault[0] == method and fault[1] in path and fault[3]:
                fault[3] -= 1
                if not fault[2]:
                    self.rfile.read(10)  # some of the body, then the line is cut
                    self.close_connection = True
                    self.connection.close()
                    return
                self._body()
                self._send(fault[2], {"error": "planned"})
                return
        body = self._body()
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._api(method, parts[1:], body)
        elif parts[0] == "lfs":
            self._store(parts[1], body)
        elif parts[-2:] == ["objects", "batch"]:
            self._batch(json.loads(body))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(method, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, {"error": path})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- endpoints --------------------------------------------------------------------------------

    def _api(self, method: str, parts: list[str], body: bytes) -> None:
        if parts[:2] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.state.repos:
                self._send(409, {"error": "exists", "url": f"{self.state.url}/{name}"})
                return
            self.state.repos[name] = Repo(asked.get("visibility") == "private")
            self._send(200, {"url": f"{self.state.url}/{name}"})
        elif parts == ["validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
        elif parts[0] == "models" and "/".join(parts[1:3]) in self.state.repos:
            name = "/".join(parts[1:3])
            self._model(method, name, self.state.repos[name], parts[3:], body)
        else:
            self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def _model(self, method: str, name: str, repo: Repo, rest: list[str], body: bytes) -> None:
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("info", "main")
        if verb == "branch":
            known = revision in repo.branches
            repo.branches.setdefault(revision, dict(repo.branches["main"]))
            self._send(409 if known else 200, {})
            return
        files = repo.files(revision)
        if files is None:
            self._send(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "preupload":
            self._send(200, {"files": [self._mode(files, f) for f in json.loads(body)["files"]]})
        elif verb == "commit":
            self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        elif verb == "tree":
            self._send(200, [_entry(path, data) for path, data in sorted(files.items())])
        else:
            self._send(
                200,
                {
                    "id": name,
                    "private": repo.private,
                    "sha": sha_of(files),
                    "siblings": [{"rfilename": path} for path in files],
                },
            )

    def _mode(self, files: dict[str, bytes], asked: dict[str, Any]) -> dict[str, Any]:
        large = asked["path"].endswith(LARGE)
        held = files.get(asked["path"])
        oid = None
        if held is not None:
            oid = hashlib.sha256(held).hexdigest() if large else git_oid(held)
        mode = "lfs" if large else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.state.stored:
                answer["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(422, {"error": "not the content that was announced"})
            return
        self.state.stored[oid] = body
        self._send(200, {})

    def _commit(self, name: str, repo: Repo, revision: str, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.branches[revision])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.stored:
                    self._send(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = self.state.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[revision] = files
        repo.commits.append({"revision": revision, **lines[0]["value"]})
        oid = sha_of(files)
        self._send(200, {"commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"})

    def _resolve(self, method: str, name: str, revision: str, path: str) -> None:
        repo = self.state.repos.get(name)
        files = repo.files(revision) if repo else None
        if files is None or path not in files:
            self._send(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
            return
        commit = {"X-Repo-Commit": sha_of(files), "ETag": f'"{git_oid(files[path])}"'}
        self._send(200, files[path], commit)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": git_oid(data),
    }
    if path.endswith(LARGE):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry
