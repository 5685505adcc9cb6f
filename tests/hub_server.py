"""A small Hugging Face Hub in memory: the part of its HTTP interface that pushes and loads use.

It knows tokens with roles, private repositories, branches and large files (LFS), which it keeps when an upload breaks
off. It cannot take Xet uploads: set HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")  # kept as large files; pictures too, so that an upload has two
NAME = "([^/]+/[^/]+)"


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, str]  # path: name of its blob


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]


@dataclass
class Hub:
    """What the server holds, and switches for the tests.

    Attributes:
        tokens: who each one is of, and "write" or "read".
        received: bodies of all requests, as they came, those of large files too.
        calls: method, path and answer of all requests.
        puts: names of the large files that were uploaded, one for each upload.
        hold_after: so many large files are taken; the next one is read and never answered. None: all are.
        held: set when an upload hangs.
        fail: paths of requests that are answered with this status.
    """

    tokens: dict[str, tuple[str, str]]
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    received: list[bytes] = field(default_factory=list)
    calls: list[tuple[str, str, int]] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    fail: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def clear(self) -> None:
        """Forget all but the tokens."""
        for each in (self.repos, self.blobs, self.received, self.calls, self.puts, self.fail):
            each.clear()

    def commits(self, repo: str, branch: str = "main") -> list[Commit]:
        return self.repos[repo].branches[branch]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of the last commit."""
        return {path: self.blobs[blob] for path, blob in self.commits(repo, branch)[-1].files.items()}

    def add_repo(self, name: str, private: bool = False, **files: bytes) -> None:
        blobs = {path.replace("__", "."): hashlib.sha256(content).hexdigest() for path, content in files.items()}
        self.blobs |= {blobs[path.replace("__", ".")]: content for path, content in files.items()}
        first = Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit", blobs)
        self.repos[name] = Repo(private, {"main": [first]})


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str = ""):
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        try:
            raw = self.body()
            self.hub.received.append(self.path.encode() + raw)
            for part, status in self.hub.fail.items():
                if part in self.path_only:
                    raise Refused(status, "Broken", "the test has asked for this")
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, self.path_only)
                if match and method == self.command.replace("HEAD", "GET"):
                    return function(self, raw, *match.groups())
            raise Refused(404, f"NotImplementedHere:{self.path_only}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.reply({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_PUT = do_POST = handle_one

    def body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if length or "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        out = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "json") -> None:
        self.hub.calls.append((self.command, self.path_only, status))
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what.

    def user(self) -> tuple[str, str] | None:
        """Name and role; None without a token."""
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        if (token := given.removeprefix("Bearer ")) not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, name: str, write: bool = False) -> Repo:
        user = self.user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
            raise Refused(404, "RepoNotFound", "Repository not found")
        if write:
            self.must_write(name.split("/")[0])
        return repo

    def must_write(self, owner: str) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        if user != (owner, "write"):
            raise Refused(403, "", f"You don't have the required permissions: {user[1]}")

    def commit_of(self, repo: Repo, revision: str | None) -> Commit:
        if (branch := repo.branches.get(revision or "main")) is not None:
            return branch[-1]
        for commit in (commit for commits in repo.branches.values() for commit in commits):
            if commit.oid == revision:
                return commit
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # Requests.

    def whoami(self, raw: bytes) -> None:
        if (user := self.user()) is None:
            raise Refused(401, "", "Invalid username or password.")
        self.reply({"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}, "orgs": []})

    def create(self, raw: bytes) -> None:
        asked = json.loads(raw)
        name = f"{asked['organization']}/{asked['name']}"
        self.must_write(asked["organization"])
        if name in self.hub.repos:
            return self.reply({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.add_repo(name, asked.get("visibility") == "private", __gitattributes=b"*.safetensors filter=lfs\n")
        self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self, raw: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def auth_check(self, raw: bytes, name: str, write: str | None) -> None:
        self.repo(name, write=bool(write))
        self.reply({})

    def branch(self, raw: bytes, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        self.reply({})

    def info(self, raw: bytes, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        commit = self.commit_of(repo, revision)
        when = "2026-01-01T00:00:00.000Z"
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"_id": "0", "id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "tags": []}
        self.reply({**about, "siblings": siblings, "downloads": 0, "likes": 0, "lastModified": when, "createdAt": when})

    def tree(self, raw: bytes, name: str, revision: str, folder: str | None) -> None:
        files = self.commit_of(self.repo(name), revision).files
        inside = f"{folder}/" if folder else ""
        found = [
            {"type": "file", "path": path, "size": len(self.hub.blobs[blob]), "oid": git_oid(self.hub.blobs[blob])}
            for path, blob in sorted(files.items())
            if path.startswith(inside)
        ]
        if inside and not found:
            raise Refused(404, "EntryNotFound")
        self.reply(found)

    def resolve(self, raw: bytes, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(self.repo(name), revision)
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            return self.reply(b"Entry not found", 404, headers)
        content = self.hub.blobs[commit.files[path]]
        headers = {"ETag": f'"{commit.files[path]}"', "X-Repo-Commit": commit.oid, "X-Linked-Size": str(len(content))}
        self.reply(content, headers=headers, kind="octet-stream")

    def preupload(self, raw: bytes, name: str, revision: str) -> None:
        files = self.commit_of(self.repo(name, write=True), revision).files
        answer = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": files.get(each["path"]),
            }
            for each in json.loads(raw)["files"]
        ]
        self.reply({"files": answer})

    def large_files(self, raw: bytes, name: str) -> None:
        self.repo(name, write=True)
        objects = []
        for each in json.loads(raw)["objects"]:
            found = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.blobs:  # else there is nothing to upload
                found["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{each['oid']}"}}
            objects.append(found)
        self.reply({"transfer": "basic", "objects": objects}, kind="vnd.git-lfs+json")

    def put(self, raw: bytes, oid: str) -> None:
        if hashlib.sha256(raw).hexdigest() != oid:
            raise Refused(400, "BadSha256")
        with self.hub.lock:  # one of two that come at the same time is the first
            held = self.hub.hold_after is not None and len(self.hub.puts) >= self.hub.hold_after
            if not held:
                self.hub.blobs[oid] = raw
                self.hub.puts.append(oid)
        if held:
            self.hub.held.set()
            threading.Event().wait()  # a line that has gone dead; the thread ends with the tests
        self.reply(b"")

    def commit(self, raw: bytes, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        last = self.commit_of(repo, revision)
        files, title = dict(last.files), ""
        for line in map(json.loads, raw.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                content = base64.b64decode(value["content"])
                self.hub.received.append(content)
                files[value["path"]] = git_oid(content)
                self.hub.blobs[files[value["path"]]] = content
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, "LfsObjectMissing")
                files[value["path"]] = value["oid"]
            else:
                raise Refused(400, f"NotImplementedHere:{key}")
        with self.hub.lock:
            oid = hashlib.sha1(json.dumps([last.oid, title, files], sort_keys=True).encode()).hexdigest()
            repo.branches[revision].append(Commit(oid, title, files))
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}/auth-check(/write)?", Handler.auth_check),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("GET", f"/api/models/{NAME}(?:/revision/(.+))?", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)(?:/(.*))?", Handler.tree),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.large_files),
    ("PUT", "/_lfs/([0-9a-f]+)", Handler.put),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
]


def start(**tokens: tuple[str, str]) -> Hub:
    """Start a server in a thread of this process; tokens by their text."""
    hub = Hub(dict(tokens))
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub
