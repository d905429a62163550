"""A hub on this machine: the few requests that make a repository and commit files to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was made and uploaded; `refuse` answers every request with this status."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # NAME@REVISION -> files
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    refuse: int | None = None

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        if self.refuse:
            return self.refuse, {"error": "not yours"}
        if path == "/api/validate-yaml":  # of a card's head
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            # clients before 2.0 say `private`
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            if f"{name}@main" in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}
            self.repos[f"{name}@main"] = {".gitattributes": b""}
            return 200, {"url": f"{self.url}/{name}"}
        if found := re.fullmatch(r"/upload/(\w+)", path):
            self.large[found[1]] = body
            return 200, {}
        if found := re.fullmatch(r"/([\w-]+/[\w-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/([\w-]+)/([\w-]+))?", path)
        if found is None:
            return 404, {"error": f"the stand-in knows no {method} {path}"}
        name, what, revision = found[1], found[2] or "revision", found[3] or "main"
        if what == "branch":
            self.repos[f"{name}@{revision}"] = {}
            return 200, {}
        return self._of_files(name, what, revision, body)

    def _of_files(self, name: str, what: str, revision: str, body: bytes) -> tuple[int, Any]:
        files = self.repos.get(f"{name}@{revision}")
        if files is None:
            return 404, {"error": "no such repository or revision"}
        if what in ("revision", "tree"):
            listed = [self._entry(path, content) for path, content in files.items()]
            siblings = [{"rfilename": path} for path in files]
            return 200, listed if what == "tree" else {"id": name, "siblings": siblings}
        if what == "paths-info":
            asked = re.findall(r"paths=([^&]*)", body.decode()) or json.loads(body)["paths"]
            return 200, [self._entry(path, files[path]) for path in asked if path in files]
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = ["lfs" if f["path"].endswith(".safetensors") else "regular" for f in asked]
            return 200, {"files": [
                {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                for f, mode in zip(asked, modes, strict=True)
            ]}  # fmt: skip
        assert what == "commit", what
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        commit = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": blob}


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in that answers while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
