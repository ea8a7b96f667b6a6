"""A Hugging Face Hub on this machine for tests: real hashes, and faults on request.

``root/models/org/name/`` and ``root/datasets/org/name/`` are the repositories as they are now; a
changed file is a new commit of ``main``. ``.../name@v2/`` is the revision v2; a slash in a revision
is %2F in the folder's name. Also by hand, for
HF_ENDPOINT:  ``python tests/hub_server.py FOLDER``.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?")
PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/main")
COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/main")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
CONTENT = re.compile(r"/lfs/([0-9a-f]{64})")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


LARGE = (".safetensors", ".parquet", ".bin")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None


class HubServer:
    """``with HubServer(root) as hub``: serves at ``hub.url`` until the block ends.

    ``faults`` is a list of ``{"path": regex, "kind": KIND, "times": N}``, matched with the method
    and the path ("GET /org/name/resolve/..."); KIND is an HTTP status, sent with the rule's
    "headers", or reset (TCP RST in the
    middle), cut (end in the middle), stall (silence in the middle), wrong_bytes, down (no answer
    at all). ``gated`` and ``private`` are sets of org/name; ``tokens`` those that may read them.
    Who has one may push as well, to the organisations in ``owners``; ``objects`` are the contents
    that arrived by Git LFS, by their sha256.
    """

    def __init__(self, root: Path):
        self.root = root
        self.faults: list[dict] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.tokens: set[str] = set()
        self.owners = {"org"}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.is_closing = threading.Event()
        self._oids: dict[tuple, dict] = {}
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """From now on nobody listens: connection refused."""
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, request: Request) -> tuple[str, dict[str, str]]:
        """The kind and the headers of the first rule that matches and is not used up yet."""
        with self._lock:
            self.requests.append(request)
            for rule in self.faults:
                is_meant = re.search(rule["path"], f"{request.method} {request.path}")
                if is_meant and rule.get("times", 1) > 0:
                    rule["times"] = rule.get("times", 1) - 1
                    return str(rule["kind"]), rule.get("headers", {})
        return "", {}

    def tree(self, folder: Path) -> list[dict]:
        """Entries as the Hub lists them, with git's and, for large formats, LFS's hashes."""
        entries = []
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir():
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries.append({"type": "directory", "path": name, "size": 0, "oid": oid})
            else:
                entries.append({"type": "file", "path": name, **self._hashes(path)})
        return entries

    def _hashes(self, path: Path) -> dict:
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._oids:
            data = path.read_bytes()
            found = {"size": len(data), "oid": git_blob(data)}
            if path.suffix in LARGE:
                sha256 = hashlib.sha256(data).hexdigest()
                pointer = f"version https://git-lfs\noid sha256:{sha256}\nsize {len(data)}\n"
                found["oid"] = git_blob(pointer.encode())
                found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
            self._oids[key] = found
        return self._oids[key]

    def find(self, kind: str, name: str, revision: str | None) -> tuple[Path | None, str]:
        """The folder and commit of a revision; (None, "") if there is no such revision."""
        home = self.root / kind
        for folder in [home / name, *home.glob(f"{name}@*")]:
            listing = json.dumps(self.tree(folder)).encode()
            commit = hashlib.sha1(listing).hexdigest()
            label = folder.name.partition("@")[2] or "main"
            if (revision or "main") in (label, unquote(label), commit):
                return folder, commit
        return None, ""


def unquoted(part: str | None) -> str | None:
    return None if part is None else unquote(part)


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        quoted = urlsplit(
            self.path
        ).path  # a revision such as refs/convert/parquet is one part of it
        path = unquote(quoted)
        request = Request(self.command, path, self.headers["Authorization"])
        fault, headers = self.hub.take_fault(request)
        if fault == "down":
            self.close_connection = True
        elif fault.isdigit():
            self.answer(int(fault), b"a fault", headers)
        elif match := TREE.fullmatch(quoted):
            self.send_tree(*map(unquoted, match.groups()))
        elif match := API.fullmatch(quoted):
            self.send_info(*map(unquoted, match.groups()))
        elif match := FILE.fullmatch(quoted):
            kind, *rest = map(unquoted, match.groups())
            self.send_file("datasets" if kind else "models", *rest, fault)
        else:
            self.answer(404, b"nothing here")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """What a push asks: the protocol of huggingface_hub 2.4 without Xet."""
        path = unquote(urlsplit(self.path).path)
        fault, headers = self.hub.take_fault(
            Request(self.command, path, self.headers["Authorization"])
        )
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if fault == "down":
            self.close_connection = True
        elif fault.isdigit():
            self.answer(int(fault), b"a fault", headers)
        elif match := CONTENT.fullmatch(path):
            self.take_content(match[1], body, fault)
        elif path == "/api/validate-yaml":
            is_odd = "license: mine" in json.loads(body)["content"]
            found = [{"message": '"license" must be one of [apache-2.0, mit]'}] if is_odd else []
            self.answer(400 if is_odd else 200, json.dumps({"errors": found}).encode())
        elif (self.headers["Authorization"] or "").removeprefix("Bearer ") not in self.hub.tokens:
            self.answer(401, b"")
        elif path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif match := PREUPLOAD.fullmatch(path):
            self.answer_json({"files": self.modes(match[1], json.loads(body)["files"])})
        elif BATCH.fullmatch(path):
            self.answer_json({"objects": [self.wanted(o) for o in json.loads(body)["objects"]]})
        elif match := COMMIT.fullmatch(path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, b"nothing here")

    do_PUT = do_POST

    def create_repo(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        folder, url = self.hub.root / "models" / name, f"{self.hub.url}/{name}"
        if asked["organization"] not in self.hub.owners:
            self.answer(403, b"")
        elif folder.is_dir():
            self.answer(409, json.dumps({"error": "You already created it", "url": url}).encode())
        else:
            folder.mkdir(parents=True)
            (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            if asked.get("visibility") == "private":
                self.hub.private.add(name)
            self.answer_json({"url": url})

    def modes(self, name: str, asked: list[dict]) -> list[dict]:
        """How each file is to come: its content in the commit, or by Git LFS."""
        there = {e["path"]: e for e in self.hub.tree(self.hub.root / "models" / name)}
        answers = []
        for path in [file["path"] for file in asked]:
            mode = "lfs" if path.endswith(LARGE) else "regular"
            entry = there.get(path, {})
            oid = entry["lfs"]["oid"] if "lfs" in entry else entry.get("oid")
            known = {"oid": oid} if oid else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return answers

    def wanted(self, asked: dict) -> dict:
        """Where a content is to be sent; nowhere if it is here."""
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.hub.objects:
            found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        return found

    def take_content(self, oid: str, body: bytes, fault: str) -> None:
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif hashlib.sha256(body).hexdigest() != oid:
            self.answer(422, b"")
        else:
            is_wrong = fault == "wrong_bytes"
            self.hub.objects[oid] = bytes([body[0] ^ 1]) + body[1:] if is_wrong else body
            self.answer(200, b"")

    def commit(self, name: str, lines: list[dict]) -> None:
        folder = self.hub.root / "models" / name
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "header":
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                path.write_bytes(self.hub.objects[value["oid"]])
            else:
                assert kind == "deletedFile", kind
                path.unlink()
        _, commit = self.hub.find("models", name, None)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": url})

    def answer_json(self, found: dict) -> None:
        self.answer(200, json.dumps(found).encode())

    def commit_of(self, kind: str, name: str, revision: str | None) -> tuple[Path | None, str]:
        """Like ``find``; if it finds nothing, the Hub's error has been sent."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        is_hidden = name in self.hub.private and token not in self.hub.tokens
        if is_hidden or not (self.hub.root / kind / name).is_dir():
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None, ""
        folder, commit = self.hub.find(kind, name, revision)
        if folder is None:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return folder, commit

    def send_info(self, kind: str, name: str, revision: str | None) -> None:
        folder, commit = self.commit_of(kind, name, revision)
        if folder:
            found = {"id": name, "sha": commit, "private": name in self.hub.private}
            self.answer(200, json.dumps({**found, "siblings": []}).encode())

    def send_tree(self, kind: str, name: str, revision: str, below: str | None) -> None:
        folder, _ = self.commit_of(kind, name, revision)
        if folder:
            entries = self.hub.tree(folder)
            inside = [e for e in entries if not below or e["path"].startswith(f"{below}/")]
            self.answer(200, json.dumps(inside).encode())

    def send_file(self, kind: str, name: str, revision: str, path: str, fault: str) -> None:
        folder, commit = self.commit_of(kind, name, revision)
        if folder is None:
            return
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if name in self.hub.gated and token not in self.hub.tokens:
            return self.answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
        if not (folder / path).is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.answer(404, b"", headers)
        data = (folder / path).read_bytes()
        hashes = self.hub._hashes(folder / path)
        etag = hashes["lfs"]["oid"] if "lfs" in hashes else hashes["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if fault == "wrong_bytes":
            data = bytes([data[0] ^ 1]) + data[1:]
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start, total = int(found[1]), len(data)
            status, data = 206, data[start:]
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.answer(status, data, headers, fault)

    def answer(self, status: int, body: bytes, headers: dict | None = None, fault="") -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        is_broken = fault in ("reset", "cut", "stall")
        self.wfile.write(body[: len(body) // 2] if is_broken else body)
        if is_broken:
            self.wfile.flush()
            self.close_connection = True
        if fault == "stall":
            self.hub.is_closing.wait(60)
        if fault == "reset":  # close with a zero linger time sends RST instead of FIN
            time.sleep(0.1)  # first let the client read what was sent
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_) -> None:
        pass


if __name__ == "__main__":
    with HubServer(Path(sys.argv[1])) as server:
        print(f"HF_ENDPOINT={server.url}", flush=True)
        threading.Event().wait()
