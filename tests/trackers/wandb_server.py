"""As much of the server of Weights & Biases as a run needs that is sent or sent again."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """``lines`` of the history and the ``summary``, of the one run that it knows.

    A client is told how many lines there are, and the last; it says where its own begin.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.lines: list[str] = []
        self.summary, self.config = "{}", "{}"
        self.names: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def data(self, query: str, variables: dict) -> dict:
        if query == "RunResumeStatus":
            model = {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": None}
            return {"model": model | ({"bucket": self.bucket()} if self.names else {})}
        if query == "UpsertBucket":
            self.names.add(variables["name"])
            self.config = variables.get("config") or self.config
            project = {"name": variables["project"], "entity": {"name": "me"}}
            bucket = {**self.bucket(), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.lines}}
        if query == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/up/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self) -> dict:
        (name,) = self.names
        own = json.loads(self.config).get("_wandb", {}).get("value", {})
        return {
            "id": "b", "name": name, "displayName": name, "historyLineCount": len(self.lines),
            "historyTail": json.dumps(self.lines[-1:]), "eventsTail": "[]", "eventsLineCount": 0,
            "logLineCount": 0, "summaryMetrics": self.summary, "config": self.config, "tags": [],
            "wandbConfig": json.dumps({"t": own["t"]} if "t" in own else {}),
        }  # fmt: skip


class Answer(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        answer = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.data(asked["operationName"], asked["variables"])}
        elif self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            if history := files.get("wandb-history.jsonl"):
                self.server.lines[history["offset"] :] = history["content"]
            if summary := files.get("wandb-summary.json"):
                (self.server.summary,) = summary["content"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, *_) -> None:
        pass
