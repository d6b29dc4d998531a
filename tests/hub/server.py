"""A Hub on loopback: repositories with commits, large-file storage, tokens, and faults on demand.

It speaks as much of the Hub's HTTP protocol as the clients ask for when they create repositories,
upload, commit, list and download; who uses it is the real ``huggingface_hub``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

OWNER_TOKEN, READ_TOKEN = "hf_ownerOwnerOwnerOwner", "hf_readerReaderReader"
_LARGE = (".safetensors", ".parquet", ".png", ".pt", ".bin")


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def lfs(self) -> dict[str, Any] | None:
        if not self.large:
            return None
        return {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], message: str) -> str:
        content = [(name, blob.oid) for name, blob in sorted(files.items())]
        sha = hashlib.sha1(f"{len(self.messages)}{message}{content}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        self.refs["main"] = sha
        return sha

    @property
    def head(self) -> dict[str, Blob]:
        return self.commits[self.refs["main"]]


@dataclass
class Fault:
    """What goes wrong with the next requests that match."""

    method: str
    path: str
    """Regular expression to be found in the path."""
    action: int | str
    """A status; "drop" the connection; "lose" the answer after the work; "half" of the body."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    before: Any = None
    """Called first, such as to commit something else."""


class LoopbackHub:
    """The server; one for the whole test session."""

    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Another host, as the Hub's: a client must not take its answers for the Hub's own.
        self.storage_url = f"http://localhost:{self._server.server_address[1]}/storage"
        self.lock = threading.Lock()
        self.reset()

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.private_by_default = False
        self.collections: dict[str, dict[str, Any]] = {}
        """What the Hub says of each collection, by its slug."""
        self.page = 1000
        """Entries of a page of a tree."""

    def put(
        self, repo_id: str, files: dict[str, bytes], kind: str = "model", private: bool = False
    ) -> str:
        """Commit files by another hand, and return the commit."""
        repo = self.repos.setdefault((kind, repo_id), Repo(private))
        before = repo.head if repo.refs else {}
        blobs = {name: Blob(content, name.endswith(_LARGE)) for name, content in files.items()}
        return repo.commit({**before, **blobs}, "by another hand")

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        """What a repository's main branch holds."""
        return {name: blob.content for name, blob in self.repos[kind, repo_id].head.items()}

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for an acknowledgement
    wbufsize = 1 << 16
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:  # the names that http.server calls
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault_for(self.command, path)
        self.lost = self.halved = False
        if fault is not None:
            if fault.before is not None:
                fault.before()
            if fault.action == "drop":
                return self._hang_up()
            if isinstance(fault.action, int) and fault.action:
                return self._say(fault.action, {"error": "a fault"}, fault.headers)
            self.lost, self.halved = fault.action == "lose", fault.action == "half"
        for pattern, method, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                with self.hub.lock:
                    response = answer(self, **match.groupdict())
                if self.lost:
                    return self._hang_up()
                return self._say(*response)
        self._say(404, {"error": f"no route for {self.command} {path}"})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _say(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = dict(headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.halved else body)
            self.wfile.flush()
            if self.halved:
                self._hang_up()

    # What the requests ask for.

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization")
        return None if given is None else given.removeprefix("Bearer ")

    def _refusal(self, repo_id: str, writing: bool) -> Any:
        """Return the answer to who may not do this; None if they may."""
        if self.token not in (None, OWNER_TOKEN, READ_TOKEN):
            said = "Invalid credentials in Authorization header"
            return 401, {"error": said}, {"X-Error-Message": said}
        if not writing:
            return None
        if self.token is None:
            said = "Invalid username or password."
            return 401, {"error": said}, {"X-Error-Message": said}
        if self.token == READ_TOKEN or not repo_id.startswith("alice/"):
            said = f"You don't have the rights to write to {repo_id}"
            return 403, {"error": said}, {"X-Error-Message": said}
        return None

    def _found(self, kind: str, repo_id: str, writing: bool = False) -> Any:
        """Return the repository, and the answer if it may not be had."""
        refusal = self._refusal(repo_id, writing)
        repo = self.hub.repos.get((kind.removesuffix("s"), repo_id))
        if refusal is None and (repo is None or (repo.private and self.token != OWNER_TOKEN)):
            said = "Repository not found"
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": said}
            refusal = (401 if self.token is None else 404), {"error": said}, headers
        return repo, refusal

    def _at(self, kind: str, repo_id: str, revision: str | None) -> Any:
        """Return repository, commit and files of a revision, and the answer if there is none."""
        repo, refusal = self._found(kind, repo_id)
        if refusal:
            return repo, None, {}, refusal
        sha = repo.refs.get(revision or "main", revision or "")
        if sha not in repo.commits:
            headers = {"X-Error-Code": "RevisionNotFound"}
            return repo, sha, {}, (404, {"error": "Invalid rev id"}, headers)
        return repo, sha, repo.commits[sha], None

    def create(self) -> Any:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if refusal := self._refusal(repo_id, writing=True):
            return refusal
        kind = asked.get("type") or "model"
        url = f"{self.hub.url}/{'' if kind == 'model' else 'datasets/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}
        # An organization's rule holds where nothing is asked for.
        asked_for = asked.get("visibility", "private" if self.hub.private_by_default else "public")
        private = asked.get("private") or asked_for == "private"
        repo = self.hub.repos[kind, repo_id] = Repo(bool(private))
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial")
        return 200, {"url": url}

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> Any:
        repo, sha, files, refusal = self._at(kind, repo_id, revision)
        if refusal:
            return refusal
        siblings = [
            {"rfilename": name, "size": len(b.content), "blobId": b.oid, "lfs": _sibling_lfs(b)}
            if "blobs" in self.query
            else {"rfilename": name}
            for name, b in sorted(files.items())
        ]
        return 200, {
            "_id": "0",
            "id": repo_id,
            "sha": sha,
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
        }

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None = None) -> Any:
        _, _, files, refusal = self._at(kind, repo_id, revision)
        if refusal:
            return refusal
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["False"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for name, blob in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            below = name[len(prefix) :].split("/")
            for depth in range(1, len(below)):
                folders.add(prefix + "/".join(below[:depth]))
            if recursive or len(below) == 1:
                entries.append(_entry(name, blob))
        if folder and not entries and not folders:
            return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
        shown = [f for f in sorted(folders) if recursive or "/" not in f[len(prefix) :]]
        entries = [*({"type": "directory", "oid": "0" * 40, "path": f} for f in shown), *entries]
        first = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if first + self.hub.page < len(entries):
            query = urlencode({**self.query, "cursor": first + self.hub.page}, doseq=True)
            address = f"{self.hub.url}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{address}>; rel="next"'
        return 200, entries[first : first + self.hub.page], headers

    def paths_info(self, kind: str, repo_id: str, revision: str) -> Any:
        _, _, files, refusal = self._at(kind, repo_id, revision)
        if refusal:
            return refusal
        paths = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
        found = []
        for path in paths:
            if path in files:
                found.append(_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "oid": "0" * 40, "path": path})
        return 200, found

    def refs(self, kind: str, repo_id: str) -> Any:
        repo, refusal = self._found(kind, repo_id)
        if refusal:
            return refusal
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.refs["main"]}]
        return 200, {"branches": branches, "converts": [], "tags": []}

    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        repo, refusal = self._found(kind, repo_id, writing=True)
        if refusal:
            return refusal
        head, modes = repo.head, []
        for file in json.loads(self.body)["files"]:
            there = head.get(file["path"])
            oid = None if there is None else there.sha256 if there.large else there.oid
            mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
            modes.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        return 200, {"files": modes}

    def lfs_batch(self, repo_id: str, kind: str | None = None) -> Any:
        _, refusal = self._found(kind or "models", repo_id, writing=True)
        if refusal:
            return refusal
        objects = []
        for asked in json.loads(self.body)["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.storage:
                one["actions"] = {
                    "upload": {"href": f"{self.hub.url}/storage/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{asked['oid']}"},
                }
            objects.append(one)
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return 400, {"error": "not what was announced"}
        self.hub.storage[oid] = self.body
        return 200, b""

    def verify(self, oid: str) -> Any:
        return (200, {}) if oid in self.hub.storage else (404, {"error": "not there"})

    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        repo, refusal = self._found(kind, repo_id, writing=True)
        if refusal:
            return refusal
        files, message = dict(repo.head), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.refs["main"]) != repo.refs["main"]:
                    said = "A commit has happened since. Please refresh and try again."
                    return 412, {"error": said}, {"X-Error-Message": said}
            elif item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    return 400, {"error": "a pointer to nothing"}
                files[value["path"]] = Blob(self.hub.storage[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, message)
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}

    def validate_yaml(self) -> Any:
        content = json.loads(self.body)["content"]
        licence = re.search(r"^license: (.*)$", content.split("\n---\n")[0], re.MULTILINE)
        if licence and licence[1] not in ("mit", "apache-2.0", "cc-by-4.0"):
            return 400, {"errors": [{"message": f'"license" must be one of, not {licence[1]}'}]}
        return 200, {"errors": [], "warnings": []}

    def whoami(self) -> Any:
        if refusal := self._refusal("alice/", writing=True):
            return refusal
        return 200, {"type": "user", "name": "alice", "auth": {"type": "access_token"}}

    def create_collection(self) -> Any:
        asked = json.loads(self.body)
        if refusal := self._refusal(f"{asked['namespace']}/", writing=True):
            return refusal
        for slug, there in self.hub.collections.items():
            if (there["owner"]["name"], there["title"]) == (asked["namespace"], asked["title"]):
                return 409, {"error": "You already have a collection of this title", "slug": slug}
        number = f"{len(self.hub.collections):024x}"
        words = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower())
        slug = f"{asked['namespace']}/{words}-{number}"
        self.hub.collections[slug] = {
            "slug": slug,
            "title": asked["title"],
            "description": asked.get("description"),
            "owner": {"name": asked["namespace"], "type": "user"},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": asked["private"],
            "theme": "green",
            "upvotes": 0,
        }
        return 200, self.hub.collections[slug]

    def collection(self, slug: str) -> Any:
        there = self.hub.collections.get(slug)
        if there is None or (there["private"] and self.token != OWNER_TOKEN):
            return 404, {"error": "Collection not found"}
        return 200, there

    def add_to_collection(self, slug: str) -> Any:
        if refusal := self._refusal(slug, writing=True):
            return refusal
        status, there = self.collection(slug)
        if status != 200:
            return status, there
        asked = json.loads(self.body)
        item = asked["item"]
        if (item["type"], item["id"]) not in self.hub.repos:
            return 404, {"error": f"{item['type']} {item['id']} not found"}
        if any((i["type"], i["id"]) == (item["type"], item["id"]) for i in there["items"]):
            return 409, {"error": "This item is in the collection already"}
        position = len(there["items"])
        added = {"_id": f"{position:024x}", **item, "position": position}
        if "note" in asked:
            added["note"] = {"text": asked["note"], "html": asked["note"]}
        there["items"].append(added)
        return 200, there

    def resolve(self, repo_id: str, revision: str, path: str, kind: str | None = None) -> Any:
        _, sha, files, refusal = self._at(kind or "models", repo_id, revision)
        if refusal:
            return refusal
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, {"error": "Entry not found"}, headers
        blob = files[path]
        if blob.large:
            self.hub.storage[blob.sha256] = blob.content
            headers |= {
                "X-Linked-Size": str(len(blob.content)),
                "X-Linked-Etag": f'"{blob.sha256}"',
                "ETag": f'"{blob.oid}"',
                "Location": f"{self.hub.storage_url}/{blob.sha256}",
            }
            return 302, b"", headers
        return self._content(blob.content, {**headers, "ETag": f'"{blob.oid}"'})

    def stored(self, oid: str) -> Any:
        if oid not in self.hub.storage:
            return 404, {"error": "not there"}
        return self._content(self.hub.storage[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> Any:
        headers["Accept-Ranges"] = "bytes"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.command == "HEAD":
            return 200, content, {**headers, "Content-Length": str(len(content))}
        if wanted is None:
            return 200, content, headers
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1], headers


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": name}
    return {**entry, "lfs": blob.lfs} if blob.large else entry


def _sibling_lfs(blob: Blob) -> dict[str, Any] | None:
    if not blob.large:
        return None
    return {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": 130}


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_ROUTES: list[tuple[str, tuple[str, ...], Any]] = [
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (_API, ("GET",), _Handler.info),
    (rf"{_API}/revision/(?P<revision>[^/]+)", ("GET",), _Handler.info),
    (rf"{_API}/tree/(?P<revision>[^/]+)", ("GET",), _Handler.tree),
    (rf"{_API}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", ("GET",), _Handler.tree),
    (rf"{_API}/paths-info/(?P<revision>[^/]+)", ("POST",), _Handler.paths_info),
    (rf"{_API}/refs", ("GET",), _Handler.refs),
    (rf"{_API}/preupload/(?P<revision>[^/]+)", ("POST",), _Handler.preupload),
    (rf"{_API}/commit/(?P<revision>[^/]+)", ("POST",), _Handler.commit),
    (r"/api/collections", ("POST",), _Handler.create_collection),
    (r"/api/collections/(?P<slug>[^/]+/[^/]+)", ("GET",), _Handler.collection),
    (r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", ("POST",), _Handler.add_to_collection),
    (r"/storage/(?P<oid>[0-9a-f]{64})", ("PUT",), _Handler.store),
    (r"/storage/(?P<oid>[0-9a-f]{64})", ("GET", "HEAD"), _Handler.stored),
    (r"/verify/(?P<oid>[0-9a-f]{64})", ("POST",), _Handler.verify),
    (
        rf"/(?:(?P<kind>datasets)/)?{_REPO}\.git/info/lfs/objects/batch",
        ("POST",),
        _Handler.lfs_batch,
    ),
    (
        rf"/(?:(?P<kind>datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        ("GET", "HEAD"),
        _Handler.resolve,
    ),
]
