"""A Hub of one's own: repositories in memory behind as much of the Hub's HTTP API as pushing and pulling take."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?P<rest>/.*)?")
RESOLVE = re.compile(r"(?P<kind>/datasets)?/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repos (`dict`): of `models/org/name` its commits, `{hash: {path: bytes}}`, the newest last, its branches, and
            whether it is private.
        breaks (`int`): how many more commits break off in the middle of the upload.
        requests (`list[str]`): what was asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.breaks, self.requests = {}, 0, []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def create(self, key: str, private: bool = False) -> None:
        self.repos[key] = {"commits": {}, "branches": {}, "private": private}
        self.commit(key, "main", {".gitattributes": b""})

    def commit(self, key: str, branch: str, files: dict[str, bytes]) -> str:
        repo = self.repos[key]
        oid = hashlib.sha1(f"{key} {len(repo['commits'])}".encode()).hexdigest()
        repo["commits"][oid], repo["branches"][branch] = files, oid
        return oid

    def files(self, key: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[key]["commits"][self.hash_of(key, revision)]

    def hash_of(self, key: str, revision: str) -> str | None:
        repo = self.repos[key]
        return revision if revision in repo["commits"] else repo["branches"].get(revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content: object = None, status: int = 200, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        # Without the commit, which clients would note down: caches stay as `snapshot_download` fills them.
        self.answer({"error": code}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_GET

    def route(self):
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append(f"{self.command} {unquote(path)}")
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "/commit/" in path and hub.breaks:
            hub.breaks -= 1
            self.rfile.read(1000)
            self.close_connection = True
            return None
        body = self.body()
        if path == "/shut-down":
            hub.socket.close()
            return self.answer({})
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user"}) if self.known else self.answer({}, 401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(**json.loads(body))
        if match := API.fullmatch(path):
            return self.in_repo(f"{match['kind']}/{match['id']}", match["rest"] or "", body)
        if match := RESOLVE.fullmatch(path):
            return self.resolve(f"{'datasets' if match['kind'] else 'models'}/{match['id']}", *match.groups()[2:])
        return self.missing("EntryNotFound")

    def create(self, name, organization=None, type="model", visibility=None, **_):
        id = f"{organization or 'me'}/{name}"
        key, url = f"{type}s/{id}", f"{self.server.endpoint}/{'' if type == 'model' else f'{type}s/'}{id}"
        if not self.known:
            return self.answer({"error": "log in first"}, 401)
        if key in self.server.repos:
            return self.answer({"url": url}, 409)
        self.server.create(key, visibility == "private")
        return self.answer({"url": url})

    def visible(self, key: str) -> bool:
        repo = self.server.repos.get(key)
        return repo is not None and (self.known or not repo["private"])

    def in_repo(self, key: str, rest: str, body: bytes):
        hub = self.server
        if not self.visible(key):
            return self.missing("RepoNotFound")
        action, _, rest = rest.removeprefix("/").partition("/")
        revision = unquote(rest.partition("/")[0]) if rest else "main"
        if action == "branch":
            hub.repos[key]["branches"].setdefault(revision, hub.hash_of(key, "main"))
            return self.answer({})
        sha = hub.hash_of(key, revision)
        if sha is None:
            return self.missing("RevisionNotFound")
        files = hub.files(key, sha)
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            info = {"id": key.partition("/")[2], "sha": sha, "private": hub.repos[key]["private"], "tags": []}
            return self.answer(info | {"siblings": siblings, "cardData": hub.repos[key].get("card", {})})
        if action == "tree":
            folder = unquote(rest.partition("/")[2])
            inside = {path: c for path, c in files.items() if path.startswith(f"{folder}/" if folder else "")}
            rows = [{"type": "file", "oid": git_oid(c), "size": len(c), "path": p} for p, c in inside.items()]
            return self.answer(rows) if rows else self.missing("EntryNotFound")
        if action == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            oids = {path: git_oid(files[path]) if path in files else None for path in asked}
            known = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": path, "oid": oid} | known for path, oid in oids.items()]})
        if action == "commit":
            return self.commit(key, revision, dict(files), [json.loads(line) for line in body.splitlines()])
        return self.missing("EntryNotFound")

    def commit(self, key: str, branch: str, files: dict[str, bytes], lines: list[dict]):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.commit(key, branch, files)
        url = f"{self.server.endpoint}/{key.removeprefix('models/')}/commit/{oid}"
        self.answer({"commitUrl": url, "commitOid": oid, "success": True})

    def resolve(self, key: str, revision: str, path: str):
        if not self.visible(key):
            return self.missing("RepoNotFound")
        sha, path = self.server.hash_of(key, unquote(revision)), unquote(path)
        if sha is None:
            return self.missing("RevisionNotFound")
        content = self.server.files(key, sha).get(path)
        if content is None:
            return self.missing("EntryNotFound")
        return self.answer(content, X_Repo_Commit=sha, ETag=f'"{git_oid(content)}"')
