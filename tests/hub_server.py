"""A stand-in for the Hub: the part of its HTTP API that downloads and `push_to_hub` use, on this machine, in memory.

Repositories have branches and commits, and may be private or gated. Every request is remembered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

Tree = dict[str, bytes]


@dataclass
class Repository:
    """One repository: every commit's files, and where each branch is."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: Tree, branch: str = "main") -> str:
        """Make a tree the newest commit of a branch; returns its hash."""
        content = [branch, str(len(self.commits)), *(f"{path} {_oid(data)}" for path, data in sorted(tree.items()))]
        sha = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[sha] = dict(tree)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a hash names."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class StandInHub:
    """The server; `with StandInHub() as hub:` runs it at `hub.url`."""

    token = "hf_secret"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken = False  # answer everything with 503
        self.fault: str | None = None  # what goes wrong while `faulty` is sent: "drop", "short", "stall" or "error"
        self.faulty = "adapter_model.safetensors"
        self.faults_left = 0  # how many times
        self.unstall = threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.unstall.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, folder: Path, branch: str = "main", **kind: bool) -> str:
        """Put a folder into a repository as a new commit."""
        repository = self.repositories.setdefault(repo_id, Repository(**kind))
        return repository.commit({path.name: path.read_bytes() for path in folder.iterdir()}, branch)

    def files(self, repo_id: str, revision: str = "main") -> Tree:
        """What a revision holds."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision) or ""]

    def downloads(self) -> list[str]:
        """The paths that were asked for with their contents, so far."""
        asked = [path.split("/resolve/") for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [rest.partition("/")[2] for _, rest in asked]


def talk_to(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let huggingface_hub of this process talk to the stand-in, with its cache in the folder and no token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.file_download.is_xet_available", lambda: False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no token"))
    connect(monkeypatch, hub.url)


def connect(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let huggingface_hub of this process look for the Hub at another address."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            return self._answer(503, {"error": "down for maintenance"})
        parts = path.split("/")
        if self.command == "POST" and path == "api/repos/create":
            return self._create(json.loads(body))
        if self.command == "POST" and path == "api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        is_api = parts[:2] == ["api", "models"]
        owner = parts[2:4] if is_api else parts[:2]
        rest = parts[4:] if is_api else parts[2:]
        repository = self.hub.repositories.get("/".join(owner))
        authorised = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not authorised):
            return self._answer(404 if authorised else 401, {"error": "Repository not found"}, "RepoNotFound")
        if repository.gated and not authorised and not (is_api and not rest):
            return self._answer(403, {"error": "Access is restricted"}, "GatedRepo")
        revision = rest[1] if len(rest) > 1 else "main"
        if is_api and self.command == "POST" and rest[:1] == ["branch"]:
            if repository.resolve(revision) is not None:
                return self._answer(409, {"error": "Reference already exists"})
            repository.branches[revision] = repository.branches["main"]
            return self._answer(201, {})
        commit = repository.resolve(revision)
        if commit is None:
            return self._answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        action = rest[0] if rest else "revision"
        if not is_api and action == "resolve":
            return self._file(repository, commit, "/".join(rest[2:]))
        if is_api and self.command == "GET" and action == "revision":
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            return self._answer(200, {"id": "/".join(owner), "sha": commit, "siblings": siblings})
        if is_api and self.command == "GET" and action == "tree":
            tree = repository.commits[commit]
            entries = [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in tree.items()]
            return self._answer(200, entries)
        if is_api and self.command == "POST" and action == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]
            return self._answer(200, {"files": modes})
        if is_api and self.command == "POST" and action == "commit":
            return self._commit(repository, "/".join(owner), revision, body)
        return self._answer(501, {"error": f"{self.command} {path} is not part of this stand-in"})

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid credentials"})
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.hub.repositories:
            return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # huggingface_hub before 2.0
        self.hub.repositories[name] = Repository(private=private)
        self.hub.repositories[name].commit({})
        return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, repository: Repository, repo_id: str, branch: str, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid credentials"})
        tree = dict(repository.commits[repository.branches[branch]])
        request = None
        if "create_pr=1" in urlsplit(self.path).query:
            request = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
            branch = f"refs/pr/{request}"
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                tree[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        sha = repository.commit(tree, branch)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if request is not None:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{request}"
        return self._answer(200, answer)

    def _file(self, repository: Repository, commit: str, path: str) -> None:
        headers = {"X-Repo-Commit": commit}
        data = repository.commits[commit].get(path)
        if data is None:
            return self._answer(404, {"error": "Entry not found"}, "EntryNotFound", headers)
        headers |= {"ETag": f'"{_oid(data)}"', "Accept-Ranges": "none"}
        if self.command == "GET" and path == self.hub.faulty and self.hub.faults_left > 0:
            self.hub.faults_left -= 1
            return self._fail(data, headers)
        return self._send(200, data, headers)

    def _fail(self, data: bytes, headers: dict[str, str]) -> None:
        """Send less than was promised, late, or not at all."""
        if self.hub.fault == "error":
            return self._answer(500, {"error": "internal error"}, headers=headers)
        kept = {"drop": 0, "stall": 0, "short": len(data) // 2}[self.hub.fault or ""]
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:kept])
        self.wfile.flush()
        if self.hub.fault == "stall":
            self.hub.unstall.wait(60)
        self.close_connection = True
        return None

    def _answer(
        self, status: int, content: Any, error: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        extra = {"X-Error-Code": error, "X-Error-Message": content["error"]} if error else {}
        extra |= {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(content).encode(), extra)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
