"""The embedding and the language model head, split by rows of the vocabulary, as vLLM splits them.

vLLM pads the vocabulary to a multiple of 64 and gives every rank as many rows; of the vocabulary itself the last ranks
may so have fewer, or none. torch's own row split (equal parts, the rest to the last) is another one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.learner.places import Gradient, Place, set_place

PADDED_TO = 64
"""vLLM's `DEFAULT_VOCAB_PADDING_SIZE`."""


def padded_vocabulary(size: int) -> int:
    """`size` rows, as vLLM pads them: 70 → 128."""
    return -(-size // PADDED_TO) * PADDED_TO


def vocabulary_rows(size: int, *, rank: int, world_size: int) -> range:
    """The rows of rank `rank`: `vocabulary_rows(70, rank=1, world_size=2)` is `range(64, 70)`."""
    part = padded_vocabulary(size) // world_size
    return range(min(rank * part, size), min((rank + 1) * part, size))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The rows `[start, start + n)` of which this rank's embedding and head hold the `n`."""

    start: int
    ranks: Ranks

    @classmethod
    def of(cls, head: nn.Module) -> "Vocabulary":
        """Of a head that nobody split: all rows."""
        return getattr(head, "vocabulary", None) or cls(0, ONE_RANK)

    def normalised(self, log_normaliser: Tensor, label_logits: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's numbers, each `[N]`, to the whole vocabulary's: log normaliser, logprobs and entropy.

        `log_normaliser` is the log-sum-exp over this rank's rows (-inf without any), `mean` its logits' mean under the
        softmax of these rows alone. The log-sum-exp of the ranks' log-sum-exps is that of the whole (as in Megatron-LM,
        arXiv 1909.08053 §3, whose maximum and sum this gathers in one message after the last chunk).
        """
        parts = self.ranks.stacked(torch.stack((log_normaliser, label_logits, mean)))
        whole = parts[:, 0].logsumexp(0)
        mean = ((parts[:, 0] - whole).exp() * parts[:, 2]).sum(0)
        return whole, parts[:, 1].sum(0) - whole, whole - mean


class VocabularyParallel(ParallelStyle):
    """For `parallelize_module`: an `nn.Embedding` or the head (`nn.Linear`), whose rows are vocabulary entries."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        size = next(module.parameters()).shape[0]
        rows = vocabulary_rows(size, rank=self._ranks.rank, world_size=self._ranks.world_size)
        for name, whole in list(module.named_parameters(recurse=False)):
            part = nn.Parameter(whole.detach()[rows.start : rows.stop].clone(), requires_grad=whole.requires_grad)
            start = (rows.start, *(0 for _ in whole.shape[1:]))
            set_place(part, Place(tuple(whole.shape), start, Gradient.OWN))
            module.register_parameter(name, part)
        module.vocabulary = Vocabulary(rows.start, self._ranks)  # pyright: ignore[reportArgumentType]
        if isinstance(module, nn.Embedding):
            _split_embedding(module, rows, device_mesh)
        return module


def _split_embedding(module: nn.Embedding, rows: range, mesh: DeviceMesh) -> None:
    """Looks up the tokens this rank has, zeros for the others, and sums over the ranks."""
    module.num_embeddings = len(rows)
    padding = module.padding_idx
    module.padding_idx = padding - rows.start if padding is not None and padding in rows else None  # pyright: ignore
    asked: list[Tensor] = []

    def look_up_held(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        [token_ids] = inputs
        held = (token_ids >= rows.start) & (token_ids < rows.stop)
        asked.append(held)
        return token_ids[held] - rows.start

    def sum_over_ranks(_: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        held = asked.pop()
        part = found.new_zeros((*held.shape, found.shape[-1])).index_put((held,), found)
        whole = DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local()

    module.register_forward_pre_hook(look_up_held)
    module.register_forward_hook(sum_over_ranks)
