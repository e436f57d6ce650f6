"""A process that answers as an engine does, without a model: `python stub_engine.py PORT`. For tests that kill it."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = "Answer: 24"
SECONDS = 0.02


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    adapter: str | None = None

    def do_GET(self) -> None:
        if self.path == "/lora/status":
            self._send({"active_adapter_path": Handler.adapter})
        else:
            self._send({"status": "ok", "digest": f"base+{Handler.adapter}" if Handler.adapter else "base"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/lora/load":
            Handler.adapter = body["adapter_path"]
            return self._send({"status": "ok"})
        time.sleep(SECONDS)
        ids = [*map(ord, ANSWER)]
        answer = {"token_ids": ids, "logprobs": [-0.5] * len(ids), "versions": [], "finish_reason": "stop"}
        self._send({"completions": [answer] * body["num_completions"]})

    def _send(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 1024
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
