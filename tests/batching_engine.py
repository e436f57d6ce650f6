"""An engine without vLLM that samples whoever waits in one batch: for benchmarks of small models on a CPU.

It answers `small_engine.py`'s routes, on its server. Requests wait in a queue; one thread
takes all that are there, samples them to their ends, and answers each. A request's dice are its own seed's.
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from small_engine import SmallEngine

GATHER_SECONDS = 0.03
"""That the first of a batch waits for others."""
ANSWER_SECONDS = 300.0


class BatchingEngine(SmallEngine):
    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self._waiting: queue.SimpleQueue[tuple[Mapping[str, Any], Future[dict[str, Any]]]] = queue.SimpleQueue()
        threading.Thread(target=self._sample_batches, daemon=True).start()

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if path != "/syncline/generate":
            return super().answer(path, body)
        answers = [Future() for _ in range(body["num_completions"])]
        for answer in answers:
            self._waiting.put((body, answer))
        return {"completions": [answer.result(ANSWER_SECONDS) for answer in answers]}

    def _sample_batches(self) -> None:
        while True:
            batch = [self._waiting.get()]
            gathering = threading.Event()
            gathering.wait(GATHER_SECONDS)
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            with self._lock:
                found = self._sample_all([body for body, _ in batch])
            self.num_generated += len(batch)
            for (_, answer), completion in zip(batch, found, strict=True):
                answer.set_result(completion)

    @torch.no_grad()
    def _sample_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Prompts are padded on the left; a row that has ended is sampled on, and cut."""
        prompts = [body["prompt_token_ids"] for body in bodies]
        asked = [body["sampling"] for body in bodies]
        num_steps, width = max(one["max_tokens"] for one in asked), max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(own)) + list(own) for own in prompts])  # [B, T]
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])  # [B, T]
        dice = torch.stack([torch.rand(num_steps, generator=_generator(one["seed"])) for one in asked])  # [B, steps]
        temperatures = torch.tensor([one["temperature"] for one in asked])[:, None]  # [B, 1]
        greedy = temperatures[:, 0] == 0
        ended = torch.zeros(len(bodies), dtype=torch.bool)
        cache, tokens, logprobs = None, [], []
        for step in range(num_steps):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = self._model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scaled = (out.logits[:, -1] / temperatures.where(temperatures > 0, 1.0)).log_softmax(-1)  # [B, V]
            drawn = (scaled.exp().cumsum(-1) < dice[:, step, None]).sum(-1).clamp(max=scaled.shape[-1] - 1)
            token = scaled.argmax(-1).where(greedy, drawn)
            tokens.append(token)
            logprobs.append(scaled.gather(-1, token[:, None])[:, 0])
            ended |= token == self._eos
            if ended.all():
                break
            ids, mask = token[:, None], torch.cat([mask, torch.ones(len(bodies), 1, dtype=mask.dtype)], -1)
        rows = zip(torch.stack(tokens, -1).tolist(), torch.stack(logprobs, -1).tolist(), asked, strict=True)
        return [self._completion(*row) for row in rows]

    def _completion(self, tokens: list[int], logprobs: list[float], asked: Mapping[str, Any]) -> dict[str, Any]:
        tokens = tokens[: asked["max_tokens"]]
        end = tokens.index(self._eos) + 1 if self._eos in tokens else len(tokens)
        reason = "stop" if self._eos in tokens else "length"
        return {"token_ids": tokens[:end], "logprobs": logprobs[:end], "versions": [], "finish_reason": reason}


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(seed or 0)
