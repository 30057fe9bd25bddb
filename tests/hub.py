"""A small local Hub: it serves repositories to the real `huggingface_hub` client."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class LocalHub:
    """Serves the folders `root/OWNER/NAME` as model repositories, with one revision, `main`."""

    def __init__(self, root: Path):
        self.root = root
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.requests: list[str] = []

    def repo(self, repo_id: str) -> Path:
        """The folder of a repository, made if it is not there."""
        folder = self.root / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, repo_id: str) -> str:
        """The hash of a repository's contents, in place of a git commit."""
        digest = hashlib.sha1(repo_id.encode())
        for name in self.files(repo_id):
            digest.update(name.encode() + (self.root / repo_id / name).read_bytes())
        return digest.hexdigest()

    def files(self, repo_id: str) -> list[str]:
        folder = self.root / repo_id
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def clear(self):
        self.requests.clear()
        shutil.rmtree(self.root)
        self.root.mkdir()


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch("/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.with_repo(*match.groups(), self.info)
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.with_repo(*match.groups(), self.tree)
        elif match := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            *repo, filename = match.groups()
            self.with_repo(*repo, lambda repo_id: self.file(repo_id, filename))
        else:
            self.error(404, "EntryNotFound", f"no such address: {path}")

    def with_repo(self, repo_id: str, revision: str | None, action):
        if not (self.hub.root / repo_id).is_dir():
            self.error(404, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", self.hub.commit(repo_id)):
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            action(repo_id)

    def info(self, repo_id: str):
        siblings = [{"rfilename": name} for name in self.hub.files(repo_id)]
        self.json({"id": repo_id, "sha": self.hub.commit(repo_id), "siblings": siblings, "tags": [], "private": False})

    def tree(self, repo_id: str):
        folder = self.hub.root / repo_id
        self.json(
            [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": self.etag(folder / name)}
                for name in self.hub.files(repo_id)
            ]
        )

    def file(self, repo_id: str, filename: str):
        path = self.hub.root / repo_id / filename
        if not path.is_file():
            self.error(404, "EntryNotFound", f"{filename} does not exist")
            return
        content, status, headers = path.read_bytes(), 200, {}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        headers |= {
            "ETag": f'"{self.etag(path)}"',
            "X-Repo-Commit": self.hub.commit(repo_id),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        self.send(status, content, headers)

    @staticmethod
    def etag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def json(self, content):
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, message: str):
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass
