"""
A small local Hub: it serves repositories to the real `huggingface_hub` client, takes uploads, and fails when told to.

    python tests/hub.py FOLDER --port 8765

serves the repositories in FOLDER until it is stopped.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class LocalHub:
    """
    Serves the folders `root/OWNER/NAME` as model repositories, revision `main`, and keeps what is uploaded; pull requests
    are further revisions, `refs/pr/1` and so on.
    """

    def __init__(self, root: Path, port: int = 0):
        self.root = root
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.agents: list[str] = []  # who has fetched files
        self.faults: list[dict] = []
        self.objects: dict[str, bytes] = {}  # uploaded LFS files by hash
        self.commits: list[dict] = []
        self.created: list[dict] = []

    def repo(self, repo_id: str, revision: str = "main") -> Path:
        """The folder of a repository, made if it is not there."""
        folder = self.folder(repo_id, revision)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def folder(self, repo_id: str, revision: str | None = "main") -> Path | None:
        """The folder of a revision: `main`, a pull request, or the hash of one of these."""
        if revision in (None, "main"):
            return self.root / repo_id
        if revision.startswith("refs/pr/"):
            return self.root / ".revisions" / repo_id / revision.replace("/", "-")
        for name in ["main", *(path.name.replace("-", "/") for path in (self.root / ".revisions" / repo_id).glob("*"))]:
            if self.commit(repo_id, name) == revision:
                return self.folder(repo_id, name)
        return None

    def commit(self, repo_id: str, revision: str | None = "main") -> str:
        """The hash of a revision's contents, in place of a git commit."""
        digest = hashlib.sha1(repo_id.encode())
        for name in self.files(repo_id, revision):
            digest.update(f"{name} {hash_of(self.folder(repo_id, revision) / name)}".encode())
        return digest.hexdigest()

    def files(self, repo_id: str, revision: str | None = "main") -> list[str]:
        folder = self.folder(repo_id, revision)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def fail(self, request: str, status: int = 0, times: int = 1, cut: int | None = None, headers: dict | None = None):
        """Answer the next `times` requests like `request`, a pattern, with an error, or cut them after `cut` bytes."""
        self.faults.append({"request": request, "status": status, "times": times, "cut": cut, "headers": headers or {}})

    def clear(self):
        for things in (self.requests, self.ranges, self.agents, self.faults, self.objects, self.commits, self.created):
            things.clear()
        shutil.rmtree(self.root)
        self.root.mkdir()


def hash_of(path: Path) -> str:
    """The hash of a file's contents, computed again only once the file has changed."""
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@cache
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.fault = next((f for f in self.hub.faults if f["times"] > 0 and re.search(f["request"], request)), None)
        if self.fault is not None:
            self.fault["times"] -= 1
            if self.fault["cut"] is not None and self.command == "PUT":
                self.rfile.read(self.fault["cut"])
                self.cut()
                return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self.chunks()
        if self.fault is not None and self.fault["status"]:
            self.send(self.fault["status"], b"{}", {"Content-Type": "application/json"} | self.fault["headers"])
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.with_repo(*match.groups(), self.info)
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/tree/([^/]+|refs/pr/[0-9]+)", path):
            self.with_repo(*match.groups(), self.tree)
        elif match := re.fullmatch("/([^/]+/[^/]+)/resolve/(refs/pr/[0-9]+|[^/]+)/(.+)", path):
            *repo, filename = match.groups()
            self.with_repo(*repo, lambda repo_id, revision: self.file(repo_id, revision, filename))
        elif path == "/api/repos/create":
            self.create()
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif re.fullmatch("/api/models/[^/]+/[^/]+/preupload/.+", path):
            self.preupload()
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch()
        elif match := re.fullmatch("/lfs/([0-9a-f]+)", path):
            self.hub.objects[match[1]] = self.body
            self.send(200, b"", {})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.with_repo(*match.groups(), lambda repo_id, _: self.receive(repo_id, match[2], "create_pr=1" in url.query))
        else:
            self.error(404, "EntryNotFound", f"no such address: {path}")

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # uploads

    def create(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if (self.hub.root / repo_id).is_dir():
            answer = {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo_id}"}
            self.send(409, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        self.hub.created.append(wanted)
        self.hub.repo(repo_id)
        self.json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    def preupload(self):
        files = json.loads(self.body)["files"]
        mode = lambda path: "lfs" if path.endswith((".safetensors", ".bin", ".png")) else "regular"
        answer = [{"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False} for file in files]
        self.json({"files": answer})

    def lfs_batch(self):
        def actions(wanted: dict) -> dict:
            known = wanted["oid"] in self.hub.objects
            return {} if known else {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}

        wanted = json.loads(self.body)["objects"]
        self.json({"transfer": "basic", "objects": [{**o, **actions(o)} for o in wanted]})

    def receive(self, repo_id: str, revision: str, create_pr: bool):
        """A commit: all of its files, or none."""
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        contents = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.objects.get(value["oid"], b"")
                if hashlib.sha256(content).hexdigest() != value["oid"]:
                    self.error(400, "BadRequest", f"{value['path']} was not uploaded")
                    return
                contents[value["path"]] = content
        if create_pr:
            number = len(list((self.hub.root / ".revisions" / repo_id).glob("*"))) + 1
            revision = f"refs/pr/{number}"
            shutil.copytree(self.hub.repo(repo_id), self.hub.folder(repo_id, revision))
        folder = self.hub.repo(repo_id, revision)
        for path, content in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        self.hub.commits.append(
            {"repo_id": repo_id, "revision": revision, "summary": header["summary"], "files": [*contents]}
        )
        oid = self.hub.commit(repo_id, revision)
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{revision.split('/')[-1]}"
        self.json(answer)

    # downloads

    def with_repo(self, repo_id: str, revision: str | None, action):
        if not (self.hub.root / repo_id).is_dir():
            self.error(404, "RepoNotFound", "Repository not found")
        elif self.hub.folder(repo_id, revision) is None or not self.hub.folder(repo_id, revision).is_dir():
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            action(repo_id, revision)

    def info(self, repo_id: str, revision: str | None):
        siblings = [{"rfilename": name} for name in self.hub.files(repo_id, revision)]
        sha = self.hub.commit(repo_id, revision)
        self.json({"id": repo_id, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, repo_id: str, revision: str | None):
        folder = self.hub.folder(repo_id, revision)
        self.json(
            [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": self.etag(folder / name)}
                for name in self.hub.files(repo_id, revision)
            ]
        )

    def file(self, repo_id: str, revision: str, filename: str):
        path = self.hub.folder(repo_id, revision) / filename
        if not path.is_file():
            self.error(404, "EntryNotFound", f"{filename} does not exist")
            return
        content, status, headers = path.read_bytes(), 200, {}
        self.hub.ranges.append(self.headers.get("Range", ""))
        if self.command == "GET":
            self.hub.agents.append(self.headers.get("User-Agent", ""))
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        headers |= {
            "ETag": f'"{self.etag(path)}"',
            "X-Repo-Commit": self.hub.commit(repo_id, revision),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        self.send(status, content, headers)

    @staticmethod
    def etag(path: Path) -> str:
        return hash_of(path)

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
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault["cut"] is not None:
            self.wfile.write(content[: self.fault["cut"]])
            self.wfile.flush()
            self.cut()
            return
        self.wfile.write(content)

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the folders FOLDER/OWNER/NAME as model repositories.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"HF_ENDPOINT={LocalHub(options.folder, options.port).endpoint}", flush=True)
    threading.Event().wait()
