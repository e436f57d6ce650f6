"""One optimizer step: micro-batch by micro-batch, one backward each, then the gradients applied.

Peak memory follows the token budget, not the group: a micro-batch's activations are freed by its own backward. Every
normaliser was fixed by `pack` over the whole step, so the summed gradient is the full batch's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from syncline.config.schema import Learner
from syncline.learner.importance import ImportanceTally, importance_weights
from syncline.learner.losses import ALGORITHMS, ClipTally, clip_tally, k3_kl, weighted_loss
from syncline.learner.model import Reference, Scorer
from syncline.learner.optim import SplitMasterAdamW
from syncline.learner.packing import PackedBatch, pack
from syncline.learner.schedule import learning_rate
from syncline.learner.unrecorded import refuse_unrecorded, replace_unknown
from syncline.observe.metrics import Metrics, Reduction
from syncline.types import RolloutGroup


@dataclass(slots=True)
class _Tally:
    """What the micro-batches of a step add up to."""

    loss: float = 0.0
    entropy_sum: float = 0.0
    kl_sum: float = 0.0
    num_tokens: int = 0
    clip: ClipTally | None = None
    importance: ImportanceTally | None = None

    def add(
        self, loss: Tensor, entropy: Tensor, kl: Tensor | None, clip: ClipTally, importance: ImportanceTally
    ) -> None:
        self.loss += loss.item()
        self.entropy_sum += entropy.sum().item()
        self.kl_sum += kl.sum().item() if kl is not None else 0.0
        self.num_tokens += entropy.numel()
        self.clip = clip if self.clip is None else self.clip + clip
        self.importance = importance if self.importance is None else self.importance + importance


@dataclass(frozen=True, slots=True)
class Step:
    config: Learner
    scorer: Scorer
    reference: Reference | None
    device: torch.device
    max_completion_tokens: int
    num_steps: int

    def backward(
        self,
        model: nn.Module,
        groups: Sequence[RolloutGroup],
        advantages: Mapping[str, Sequence[float]],
        report: Metrics,
    ) -> int:
        """Leaves the step's gradient on the parameters. Returns the tokens trained on, 0 when there were none."""
        refuse_unrecorded(groups, self.config)
        batches = pack(
            groups,
            advantages,
            token_budget=self.config.token_budget,
            loss=self.config.loss,
            max_completion_tokens=self.max_completion_tokens,
        )
        tally = _Tally()
        for batch in batches:
            self._microbatch(model, batch.to(self.device), tally)
        _report(tally, len(batches), report, kl=self.reference is not None)
        return tally.num_tokens

    def apply_gradients(self, optimizer: SplitMasterAdamW, step: int, report: Metrics) -> None:
        """One AdamW step of index `step`. A step nothing could be learned from changes no weight and is counted.

        Raises when a gradient is not finite, naming its parameter, with nothing changed.
        """
        rate = learning_rate(step, self.config.optimizer, num_steps=self.num_steps)
        report.add("learning_rate", rate)
        if report.reduced()["tokens/trained"] == 0:
            report.add("step/skipped", 1)
            return
        report.add("grad_norm", optimizer.step(rate))

    def _microbatch(self, model: nn.Module, batch: PackedBatch, tally: _Tally) -> None:
        loss_config = self.config.loss
        algorithm = ALGORITHMS[loss_config.name]
        logprobs, entropy = self.scorer.score(model, batch)
        sampler_logprobs = replace_unknown(batch.sampler_logprobs, logprobs)
        old = logprobs.detach() if loss_config.old_logprobs == "learner" else sampler_logprobs
        token_loss = algorithm.token_loss(
            logprobs,
            old,
            advantages=batch.advantages,
            sample_index=batch.sample_index,
            clip_low=loss_config.clip_low,
            clip_high=loss_config.clip_high,
        )
        weights, importance = importance_weights(
            logprobs, sampler_logprobs, sample_index=batch.sample_index, importance=loss_config.importance
        )
        kl = self._kl(logprobs, batch)
        loss = weighted_loss(
            token_loss, batch.loss_weights, importance_weights=weights, kl=kl, kl_coef=loss_config.kl_coef
        )
        loss.backward()
        with torch.no_grad():
            ratio = algorithm.ratio(logprobs, old, batch.sample_index)
            clip = clip_tally(ratio, batch.advantages, clip_low=loss_config.clip_low, clip_high=loss_config.clip_high)
        tally.add(loss.detach(), entropy, kl, clip, importance)

    def _kl(self, logprobs: Tensor, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        with self.reference.switched():
            ref_logprobs = self.scorer.score_without_grad(self.reference.model, batch)
        return k3_kl(logprobs, ref_logprobs)


def _report(tally: _Tally, num_microbatches: int, report: Metrics, *, kl: bool) -> None:
    report.add("loss", tally.loss)
    report.add("step/num_microbatches", num_microbatches)
    report.add("tokens/trained", tally.num_tokens, reduction=Reduction.SUM)
    if tally.clip is None or tally.importance is None:
        return
    report.add("entropy", tally.entropy_sum / tally.num_tokens)
    if kl:
        report.add("kl", tally.kl_sum / tally.num_tokens)
    report.update(tally.clip.metrics())
    report.update(tally.importance.metrics())
