"""One optimizer step: micro-batch by micro-batch, one backward each, then the gradients applied.

Peak memory follows the token budget, not the group: a micro-batch's activations are freed by its own backward. Every
normaliser was fixed by `pack` over the whole step, so the summed gradient is the full batch's, also where ranks split
the step between them.
"""

import logging
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.config.schema import Learner
from syncline.learner.importance import ImportanceTally, importance_weights
from syncline.learner.losses import (
    ALGORITHMS,
    ClipTally,
    clip_tally,
    k3_kl,
    splits_by_token,
    token_ratio,
    weighted_loss,
)
from syncline.learner.model import Reference, Scorer
from syncline.learner.optim import SplitMasterAdamW
from syncline.learner.packing import ALL, PackedBatch, Share, pack
from syncline.learner.schedule import learning_rate
from syncline.learner.unrecorded import refuse_unrecorded, replace_unknown
from syncline.observe.metrics import Metrics, Reduction
from syncline.types import RolloutGroup

log = logging.getLogger("syncline.step")
T = TypeVar("T")


@dataclass(slots=True)
class _Tally:
    """What the micro-batches of a step add up to: tensors, so that no micro-batch waits for the one before it."""

    loss: Tensor | float = 0.0
    entropy_sum: Tensor | float = 0.0
    kl_sum: Tensor | float = 0.0
    num_tokens: int = 0
    clip: ClipTally | None = None
    importance: ImportanceTally | None = None
    peak_bytes: int = 0

    def add(
        self, loss: Tensor, entropy: Tensor, kl: Tensor | None, clip: ClipTally, importance: ImportanceTally
    ) -> None:
        self.loss = self.loss + loss
        self.entropy_sum = self.entropy_sum + entropy.sum()
        self.kl_sum = self.kl_sum + kl.detach().sum() if kl is not None else 0.0
        self.num_tokens += entropy.numel()
        self.clip = clip if self.clip is None else self.clip + clip
        self.importance = importance if self.importance is None else self.importance + importance

    def __add__(self, other: "_Tally") -> "_Tally":
        """Of two ranks."""
        return _Tally(
            loss=self.loss + other.loss,
            entropy_sum=self.entropy_sum + other.entropy_sum,
            kl_sum=self.kl_sum + other.kl_sum,
            num_tokens=self.num_tokens + other.num_tokens,
            clip=self.clip + other.clip if self.clip and other.clip else self.clip or other.clip,
            importance=self.importance + other.importance
            if self.importance and other.importance
            else self.importance or other.importance,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )


@dataclass(frozen=True, slots=True)
class Step:
    config: Learner
    scorer: Scorer
    reference: Reference | None
    device: torch.device
    max_completion_tokens: int
    num_steps: int
    ranks: Ranks = ONE_RANK

    def backward(
        self,
        model: nn.Module,
        groups: Sequence[RolloutGroup],
        advantages: Mapping[str, Sequence[float]],
        report: Metrics,
        *,
        optimizer: SplitMasterAdamW,
        step: int,
    ) -> int:
        """Leaves the gradient of step `step` on the parameters, or with `optimizer.in_backward` applies it at once.

        Returns the tokens trained on, by all ranks, 0 when there were none.
        """
        refuse_unrecorded(groups, self.config)
        batches = pack(
            groups,
            advantages,
            token_budget=self.config.token_budget,
            loss=self.config.loss,
            max_completion_tokens=self.max_completion_tokens,
            share=Share(self.ranks.rank, self.ranks.world_size) if self.ranks.split_data else ALL,
        )
        tally, unseen = _Tally(), _Tally()
        for i, batch in enumerate(batches):
            last = self.config.optimizer.in_backward and i == len(batches) - 1
            with self._applied(optimizer, step, report) if last else nullcontext():
                self._with_peak(i, model, batch, unseen if batch.idle else tally)
        tally.peak_bytes = max(tally.peak_bytes, unseen.peak_bytes)
        if self.ranks.split_data:
            tally = reduce(add, self.ranks.gathered(_on_cpu(tally)))
        _report(tally, len(batches), report, kl=self.reference is not None)
        return tally.num_tokens

    def apply_gradients(self, optimizer: SplitMasterAdamW, step: int, report: Metrics) -> None:
        """One AdamW step of index `step`. A step nothing could be learned from changes no weight and is counted.

        `time/optimizer_seconds` is the step alone: what an engine that shares the weights is paused for.
        Raises when a gradient is not finite, naming its parameter, with nothing changed.
        """
        rate = learning_rate(step, self.config.optimizer, num_steps=self.num_steps)
        report.add("learning_rate", rate)
        if report.reduced()["tokens/trained"] == 0:
            report.add("step/skipped", 1)
        elif not self.config.optimizer.in_backward:
            started = self._now()
            report.add("grad_norm", optimizer.step(rate))
            report.add("time/optimizer_seconds", self._now() - started)

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _applied(self, optimizer: SplitMasterAdamW, step: int, report: Metrics) -> Iterator[None]:
        rate = learning_rate(step, self.config.optimizer, num_steps=self.num_steps)
        with optimizer.stepping_in_backward(rate) as squares:
            yield
        report.add("grad_norm", float(torch.stack(squares).sum().sqrt()))

    def _with_peak(self, index: int, model: nn.Module, batch: PackedBatch, tally: _Tally) -> None:
        """Tallies the most device memory the micro-batch had at once, weights and gradients included; 0 on a CPU."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._microbatch(model, batch.to(self.device), tally)
        if not on_gpu:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            log.info(
                "micro-batch %d: %d tokens, process peak %.2f GB (no GPU)", index, batch.num_tokens, resident / 1e9
            )
            return
        peak = torch.cuda.max_memory_allocated(self.device)
        log.info("micro-batch %d: %d tokens, peak %.2f GB of GPU memory", index, batch.num_tokens, peak / 1e9)
        tally.peak_bytes = max(tally.peak_bytes, peak)

    def _microbatch(self, model: nn.Module, batch: PackedBatch, tally: _Tally) -> None:
        ref_logprobs = self._ref_logprobs(batch)

        def loss_of(logprobs: Tensor, rows: slice) -> Tensor:
            return self._loss(logprobs, batch.labels_in(rows), None if ref_logprobs is None else ref_logprobs[rows])

        if splits_by_token(self.config.loss):
            loss, logprobs, entropy = self.scorer.loss(model, batch, loss_of)
        else:
            logprobs, entropy = self.scorer.score(model, batch)
            loss = loss_of(logprobs, slice(0, batch.num_labels))
        loss.backward()
        self._count(tally, batch, loss.detach(), logprobs=logprobs.detach(), entropy=entropy, ref_logprobs=ref_logprobs)

    def _loss(self, logprobs: Tensor, batch: PackedBatch, ref_logprobs: Tensor | None) -> Tensor:
        """The labels' part in the step's loss, from their log-probabilities."""
        config, (old, sampler_logprobs) = self.config.loss, self._divided_by(logprobs, batch.sampler_logprobs)
        token_loss = ALGORITHMS[config.name].token_loss(
            logprobs,
            old,
            advantages=batch.advantages,
            sample_index=batch.sample_index,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        weights, _ = importance_weights(
            logprobs, sampler_logprobs, sample_index=batch.sample_index, importance=config.importance
        )
        kl = self._kl(logprobs, old, ref_logprobs, batch.sample_index)
        return weighted_loss(token_loss, batch.loss_weights, importance_weights=weights, kl=kl, kl_coef=config.kl_coef)

    def _kl(self, logprobs: Tensor, old: Tensor, ref_logprobs: Tensor | None, sample_index: Tensor) -> Tensor | None:
        if ref_logprobs is None:
            return None
        kl = k3_kl(logprobs, ref_logprobs)
        return kl * token_ratio(logprobs, old, sample_index) if self.config.loss.kl_ratio else kl

    def _divided_by(self, logprobs: Tensor, recorded: Tensor) -> tuple[Tensor, Tensor]:
        """By what the PPO ratio divides, and the sampler's log-probabilities where it recorded any."""
        sampler_logprobs = replace_unknown(recorded, logprobs)
        return logprobs.detach() if self.config.loss.old_logprobs == "learner" else sampler_logprobs, sampler_logprobs

    def _ref_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        with self.reference.switched():
            return self.scorer.score_without_grad(self.reference.model, batch)

    @torch.no_grad()
    def _count(
        self,
        tally: _Tally,
        batch: PackedBatch,
        loss: Tensor,
        *,
        logprobs: Tensor,
        entropy: Tensor,
        ref_logprobs: Tensor | None,
    ) -> None:
        config, (old, sampler_logprobs) = self.config.loss, self._divided_by(logprobs, batch.sampler_logprobs)
        _, importance = importance_weights(
            logprobs, sampler_logprobs, sample_index=batch.sample_index, importance=config.importance
        )
        ratio = ALGORITHMS[config.name].ratio(logprobs, old, batch.sample_index)
        bounds = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        clip = clip_tally(ratio, batch.advantages, sample_index=batch.sample_index, **bounds)
        kl = self._kl(logprobs, old, ref_logprobs, batch.sample_index)
        tally.add(loss, entropy, kl, clip, importance)


def _on_cpu(tally: T) -> T:
    """Numbers on one GPU mean nothing to the rank of another."""
    moved: dict[str, Any] = {}
    for field in fields(tally):  # pyright: ignore[reportArgumentType]
        value = getattr(tally, field.name)
        moved[field.name] = (
            value.cpu() if isinstance(value, Tensor) else _on_cpu(value) if is_dataclass(value) else value
        )
    return replace(tally, **moved)  # pyright: ignore[reportArgumentType]


def _report(tally: _Tally, num_microbatches: int, report: Metrics, *, kl: bool) -> None:
    report.add("loss", float(tally.loss))
    report.add("step/num_microbatches", num_microbatches)
    if tally.peak_bytes:
        report.add("memory/microbatch_peak_bytes", tally.peak_bytes, reduction=Reduction.MAX)
    report.add("tokens/trained", tally.num_tokens, reduction=Reduction.SUM)
    if tally.clip is None or tally.importance is None:
        return
    report.add("entropy", float(tally.entropy_sum) / tally.num_tokens)
    if kl:
        report.add("kl", float(tally.kl_sum) / tally.num_tokens)
    report.update(tally.clip.metrics())
    report.update(tally.importance.metrics())
