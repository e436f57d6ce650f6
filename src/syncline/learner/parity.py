"""The parity gate: learner and engine score the same tokens alike, or the run stops.

The engine samples from fixed prompts and reports its log-probabilities; the learner scores the same tokens. The mean
absolute difference of a healthy bf16 pair is about 0.01; 0.05 and more has a cause (wrong weights, rope scaling,
temperature). It cannot see staleness at small learning rates: versions and digests do that.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.config.schema import Parity
from syncline.errors import ParityError
from syncline.learner.model import Scorer
from syncline.learner.packing import pack_samples
from syncline.protocols import Generate
from syncline.types import ImageRef, SamplingParams, TrainingSample

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Over all sampled tokens: E|Δ|, max|Δ| and the k3 estimate of KL(engine || learner), Δ = learner − engine."""

    mean_abs_diff: float
    max_abs_diff: float
    k3_kl: float
    num_tokens: int

    @classmethod
    def of(cls, engine: Sequence[float], learner: Sequence[float]) -> "ParityReport":
        deltas = [b - a for a, b in zip(engine, learner, strict=True)]
        return cls(
            mean_abs_diff=sum(map(abs, deltas)) / len(deltas),
            max_abs_diff=max(map(abs, deltas)),
            k3_kl=sum(math.expm1(d) - d for d in deltas) / len(deltas),
            num_tokens=len(deltas),
        )

    def metrics(self) -> dict[str, float]:
        return {
            "parity/mean_abs_diff": self.mean_abs_diff,
            "parity/max_abs_diff": self.max_abs_diff,
            "parity/k3_kl": self.k3_kl,
        }


@dataclass(frozen=True, slots=True)
class ParityGate:
    """Holds what a check needs; `connect` opens a `Generate` for the duration of one check. Every rank scores what
    rank 0 sampled."""

    config: Parity
    connect: Callable[[], Any]
    encode: Encode
    temperature: float
    scorer: Scorer
    token_budget: int
    ranks: Ranks = ONE_RANK
    shown: tuple[tuple[tuple[int, ...], ImageRef], ...] = ()
    """Prompts that show one image, in tokens."""

    def check(self, model: nn.Module, *, device: torch.device) -> ParityReport:
        """Raises `ParityError` with the figures when a threshold is passed."""
        samples = self.ranks.from_first(lambda: asyncio.run(self._sample()))
        engine: list[float] = []
        learner: list[float] = []
        for batch in pack_samples(samples, token_budget=self.token_budget):
            scored = self.scorer.score_without_grad(model, batch.to(device))
            engine += batch.sampler_logprobs.tolist()
            learner += scored.tolist()
        report = ParityReport.of(engine, learner)
        self._refuse(report)
        return report

    async def _sample(self) -> list[TrainingSample]:
        async with self.connect() as engine:
            texts = [(tuple(self.encode(prompt)), ()) for prompt in self.config.prompts]
            shown = [(token_ids, (image,)) for token_ids, image in self.shown]
            return await asyncio.gather(*(self._sample_one(engine, i, *p) for i, p in enumerate([*texts, *shown])))

    async def _sample_one(
        self, engine: Generate, index: int, token_ids: tuple[int, ...], images: tuple[ImageRef, ...]
    ) -> TrainingSample:
        sampling = SamplingParams(self.config.max_tokens, temperature=self.temperature, seed=index)
        [completion] = await engine.generate(token_ids, sampling, images=images)
        return TrainingSample.from_completion(completion.prompt_token_ids or token_ids, completion, images=images)

    def _refuse(self, report: ParityReport) -> None:
        for name, value, limit in (
            ("max_mean_abs_diff", report.mean_abs_diff, self.config.max_mean_abs_diff),
            ("max_k3_kl", report.k3_kl, self.config.max_k3_kl),
        ):
            if not value <= limit:
                raise ParityError(
                    f"learner and engine disagree on {report.num_tokens} fixed tokens: mean |Δlogprob| "
                    f"{report.mean_abs_diff:.5f}, max {report.max_abs_diff:.4f}, k3 KL {report.k3_kl:.2e}; "
                    f"parity.{name} allows {limit:g}. They do not hold the same policy: compare dtypes, rope scaling "
                    "and the engine's options before raising the limit"
                )
