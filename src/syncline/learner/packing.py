"""Rollout groups to micro-batches: sequences end to end, nothing padded, never more than `token_budget` tokens.

What every token weighs in the loss is settled here, once, from counts of the whole batch. So the gradients of the
micro-batches add up to the gradient of one big batch, whatever the budget. Ranks that split the data make the same
plan, and each fills its own part of it.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncline.config.schema import Loss
from syncline.errors import ConfigError
from syncline.learner.advantages import num_sampled
from syncline.learner.losses import ALGORITHMS, BatchCounts
from syncline.learner.unrecorded import sampler_logprobs
from syncline.types import ImageRef, Lack, Rollout, RolloutGroup, RolloutStatus, TrainingSample


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch: S sequences of T tokens in all, N of whose next tokens are trained on. Longest sequence first.

    A sequence ends before its last sampled token: that token is predicted, but predicts nothing the loss needs.
    """

    token_ids: Tensor
    """`[T]` int64, the sequences end to end."""
    position_ids: Tensor
    """`[T]` int64, from 0 in every sequence."""
    cu_seqlens: Tensor
    """`[S + 1]` int32, where each sequence starts, then T: `[0, 5, 8]`."""
    max_seqlen: int
    predict_index: Tensor
    """`[N]` int64, the position in `[0, T)` whose hidden state predicts `labels[i]`; ascending."""
    labels: Tensor
    """`[N]` int64, the sampled tokens."""
    sample_index: Tensor
    """`[N]` int64, the sequence in `[0, S)` of each label; ascending."""
    sampler_logprobs: Tensor
    """`[N]` float32, the engine's, under the policy version it sampled with; NaN where nobody recorded it."""
    advantages: Tensor
    """`[N]` float32."""
    loss_weights: Tensor
    """`[N]` float32, of the whole batch: see `losses`."""
    images: tuple[tuple[ImageRef, ...], ...] = ()
    """Of each of the S sequences, in order of its placeholders; `learner.vision` makes pixels of them."""
    idle: bool = False
    """A few tokens that weigh nothing, for a rank that has none while others compute: its gradients are zeros."""

    @property
    def num_tokens(self) -> int:
        """T: what the model computes."""
        return self.token_ids.numel()

    @property
    def num_labels(self) -> int:
        """N: what the loss sees."""
        return self.labels.numel()

    def to(self, device: torch.device | str) -> "PackedBatch":
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def labels_in(self, rows: slice) -> "PackedBatch":
        """With some of the N labels alone, whose samples are counted from 0."""
        own = ("predict_index", "labels", "sample_index", "sampler_logprobs", "advantages", "loss_weights")
        some = replace(self, **{name: getattr(self, name)[rows] for name in own})
        return replace(some, sample_index=some.sample_index - some.sample_index[:1])

    def attention_kwargs(self) -> dict[str, Any]:
        """What `attention.packed_attention` needs, under the names transformers' FlashAttention gave it."""
        return {
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }


@dataclass(frozen=True, slots=True)
class Share:
    """The micro-batches of one of `of` ranks."""

    index: int = 0
    of: int = 1


ALL = Share()


@dataclass(frozen=True)
class _Sequence:
    """A sample on its way into a micro-batch. `where` names it to people."""

    sample: TrainingSample
    where: str
    advantage: float = 0.0
    loss_weight: float = 0.0

    @cached_property
    def length(self) -> int:
        """Index of the last sampled token: the number of tokens the model must read to predict it."""
        mask = self.sample.loss_mask
        if self.sample.images and not mask[-1]:
            return len(mask)  # an image may come after the last sampled token
        return len(mask) - 1 - mask[::-1].index(True)


def pack(
    groups: Sequence[RolloutGroup],
    advantages: Mapping[str, Sequence[float]],
    *,
    loss: Loss,
    token_budget: int,
    max_completion_tokens: int,
    share: Share = ALL,
) -> Sequence[PackedBatch]:
    """Micro-batches of at most `token_budget` tokens, on the CPU; the same input gives the same batches.

    As many for every share, about as long, with about as many tokens in all; idle ones where there is nothing to do.

    Out of the loss stay rollouts without a reward, a sampled token or a weight, and truncated ones if
    `loss.mask_truncated`; the normalisers do not count them. Nothing to train on gives an empty list. Raises
    `ConfigError` naming a sample longer than the budget.
    """
    trained = [
        (f"group {group.group_id!r} rollout {i}", rollout, advantage)
        for group in groups
        for i, (rollout, advantage) in enumerate(zip(group.rollouts, advantages[group.group_id], strict=True))
        if _in_loss(rollout, loss)
    ]
    counts = BatchCounts(
        num_rollouts=sum(rollout.weight for _, rollout, _ in trained),
        num_tokens=sum(rollout.weight * num_sampled(rollout) for _, rollout, _ in trained),
        max_completion_tokens=max_completion_tokens,
    )
    token_weight = ALGORITHMS[loss.name].token_weight
    sequences = [
        _Sequence(sample, f"{where} sample {j}", advantage, rollout.weight * token_weight(num_sampled(rollout), counts))
        for where, rollout, advantage in trained
        for j, sample in enumerate(rollout.samples)
        if sample.num_sampled
    ]
    return _Collated(_microbatches(sequences, token_budget, share))


def pack_samples(samples: Sequence[TrainingSample], *, token_budget: int) -> Sequence[PackedBatch]:
    """The same packing for scoring alone: advantages and loss weights are 0.

    Samples without a sampled token are left out.
    """
    sequences = [_Sequence(sample, f"sample {i}") for i, sample in enumerate(samples) if sample.num_sampled]
    return _Collated(_microbatches(sequences, token_budget, ALL))


class _Collated(Sequence[PackedBatch]):
    """Each micro-batch is made when it is asked for, so the first does not wait for the others."""

    def __init__(self, members: list[list[_Sequence]]) -> None:
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        return _collate(self._members[index]) if self._members[index] else _idle()


def _idle() -> PackedBatch:
    sample = TrainingSample((0,) * 4, (False, False, False, True), (0.0,) * 4, (), (Lack.LOGPROBS, Lack.VERSIONS))
    return replace(_collate([_Sequence(sample, "idle")]), idle=True)


def _in_loss(rollout: Rollout, loss: Loss) -> bool:
    masked = loss.mask_truncated and rollout.status is RolloutStatus.TRUNCATED
    return rollout.reward is not None and rollout.weight > 0 and not masked and num_sampled(rollout) > 0


def _microbatches(sequences: list[_Sequence], token_budget: int, share: Share) -> list[list[_Sequence]]:
    """As few as first fit decreasing needs, then as even as they get: peak memory follows the fullest of them."""
    ordered = sorted(sequences, key=lambda sequence: -sequence.length)
    if ordered and (longest := ordered[0].length) > token_budget:
        fault = f"{token_budget} is below the {longest} tokens of {ordered[0].where}; raise it to at least {longest}"
        raise ConfigError([f"learner.token_budget: {fault}"])
    fewest = _first_fit(ordered, token_budget)
    even = _evenly(ordered, -(-len(fewest) // share.of) * share.of)
    fits = all(_num_tokens(members) <= token_budget for members in even)
    return _dealt(even if fits else fewest, share)


def _num_tokens(members: list[_Sequence]) -> int:
    return sum(sequence.length for sequence in members)


def _dealt(members: list[list[_Sequence]], share: Share) -> list[list[_Sequence]]:
    """Longest first, to and fro over the ranks: neighbours in time are alike, for ranks wait for each other."""
    if share.of == 1:
        return members
    ordered = sorted(members, key=_num_tokens, reverse=True)
    rounds = [ordered[i : i + share.of] for i in range(0, len(ordered), share.of)]
    own = [share.index if i % 2 == 0 else share.of - 1 - share.index for i in range(len(rounds))]
    return [batches[place] if place < len(batches) else [] for batches, place in zip(rounds, own, strict=True)]


def _first_fit(ordered: list[_Sequence], token_budget: int) -> list[list[_Sequence]]:
    """Each sequence, longest first, into the first micro-batch that has room."""
    members: list[list[_Sequence]] = []
    room: list[int] = []
    for sequence in ordered:
        fit = next((i for i, tokens in enumerate(room) if sequence.length <= tokens), len(room))
        if fit == len(room):
            members.append([])
            room.append(token_budget)
        members[fit].append(sequence)
        room[fit] -= sequence.length
    return members


def _evenly(ordered: list[_Sequence], num_microbatches: int) -> list[list[_Sequence]]:
    """Each sequence, longest first, into the lightest micro-batch: at most 4/3 of the best (Graham, 1969)."""
    members: list[list[_Sequence]] = [[] for _ in range(num_microbatches)]
    lightest = [(0, i) for i in range(num_microbatches)]
    for sequence in ordered:
        tokens, i = heapq.heappop(lightest)
        members[i].append(sequence)
        heapq.heappush(lightest, (tokens + sequence.length, i))
    return members


def _collate(sequences: list[_Sequence]) -> PackedBatch:
    lengths = [sequence.length for sequence in sequences]
    starts = list(itertools.accumulate(lengths, initial=0))
    sampled = [_tensor(s.sample.loss_mask, np.bool_).nonzero().flatten() for s in sequences]
    counts = torch.tensor([len(indices) for indices in sampled])
    ids = [_tensor(s.sample.token_ids, np.int64) for s in sequences]

    def of_each(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

    return PackedBatch(
        token_ids=torch.cat([t[:length] for t, length in zip(ids, lengths, strict=True)]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=lengths[0],
        predict_index=torch.cat([i + start - 1 for i, start in zip(sampled, starts[:-1], strict=True)]),
        labels=torch.cat([t[i] for t, i in zip(ids, sampled, strict=True)]),
        sample_index=torch.arange(len(sequences)).repeat_interleave(counts),
        sampler_logprobs=torch.cat(
            [_tensor(sampler_logprobs(s.sample), np.float32)[i] for s, i in zip(sequences, sampled, strict=True)]
        ),
        advantages=of_each([s.advantage for s in sequences]),
        loss_weights=of_each([s.loss_weight for s in sequences]),
        images=tuple(s.sample.images for s in sequences),
    )


def _tensor(values: tuple[Any, ...], kind: Any) -> Tensor:
    """By numpy, which reads Python's numbers some twenty times as fast as torch does."""
    return torch.from_numpy(np.array(values, dtype=kind))
