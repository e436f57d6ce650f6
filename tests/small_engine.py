"""An engine without vLLM behind the routes that `EngineClient` and `EngineController` ask: a model, a token a time.

For tests of what asks engines, and of what happens when it is killed: the server lives in the test's process.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.bridges.saved import tensors_as_in_memory


class SmallEngine:
    """Samples with a generator of the request's own seed, so the same question gets the same answer again."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._eos = self._model.config.eos_token_id
        self._lock = threading.Lock()
        self._version, self._digests = -1, parameter_digests(self._model.named_parameters())
        self.num_generated = 0

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Whoever asks how it is does not wait for those who sample."""
        if path == "/syncline/generate":
            with self._lock:
                found = {"completions": [self._sample(body) for _ in range(body["num_completions"])]}
                self.num_generated += 1
            return found
        if path == "/syncline/parameters":
            return {"parameters": self._digests}
        if path == "/syncline/reload":
            with self._lock:
                self._load(Path(body["path"]), body["expected"]["policy_version"])
        return {
            "status": "ok",
            "policy_version": self._version,
            "digest": model_digest(self._digests),
            "generation": "",
            "pause": 0,
        }

    @torch.no_grad()
    def _load(self, folder: Path, version: int) -> None:
        held = dict(self._model.named_parameters())
        for name, tensor in tensors_as_in_memory(folder, held.keys()):
            held[name].copy_(tensor)
        self._version, self._digests = version, parameter_digests(held.items())

    @torch.no_grad()
    def _sample(self, body: Mapping[str, Any]) -> dict[str, Any]:
        asked, ids = body["sampling"], list(body["prompt_token_ids"])
        dice = torch.Generator().manual_seed(asked["seed"] or 0)
        sampled: list[int] = []
        logprobs: list[float] = []
        while len(sampled) < asked["max_tokens"] and (not sampled or sampled[-1] != self._eos):
            logits = self._model(torch.tensor([ids + sampled])).logits[0, -1]
            scaled = (logits / (asked["temperature"] or 1.0)).log_softmax(-1)
            token = int(torch.multinomial(scaled.exp(), 1, generator=dice) if asked["temperature"] else scaled.argmax())
            sampled.append(token)
            logprobs.append(float(scaled[token]))
        reason = "stop" if sampled[-1] == self._eos else "length"
        return {"token_ids": sampled, "logprobs": logprobs, "versions": [], "finish_reason": reason}


@contextmanager
def small_engine(model: Path, kind: type[SmallEngine] = SmallEngine) -> Iterator[tuple[SmallEngine, str]]:
    """The engine and its URL."""
    engine = kind(model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError, json.JSONDecodeError):  # whoever asked is gone
                super().handle()

        def _answer(self, body: Mapping[str, Any]) -> None:
            self._send(json.dumps(engine.answer(self.path, body)).encode())

        def _send(self, text: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            del args

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield engine, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
