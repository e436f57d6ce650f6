"""A LoRA adapter as one flat buffer: which tensor lies where, and the digest of each; the same on both sides.

Both sides hold it as the engine computes with it: in the engine's type, B already multiplied by its layer's scaling
(`alpha / rank`, `alpha / sqrt(rank)` for rsLoRA). So the digests compare bits, and the engine has nothing to round.
Every tensor starts at a block's boundary and its last block is filled with zeros, so one pass digests all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from syncline.bridges.receipt import mixed_words
from syncline.errors import SyncError

A, B = ".lora_A.weight", ".lora_B.weight"
_BLOCK_WORDS = 512
_CHUNK_BLOCKS = 1 << 14


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One adapted linear layer: y = W x + scaling · B (A x)."""

    a: torch.Tensor
    """`[rank, in]`"""
    b: torch.Tensor
    """`[out, rank]`"""
    scaling: float


def is_adapter_name(name: str) -> bool:
    return name.endswith((A, B))


class AdapterLayout:
    """Where each tensor of an adapter lies. `shapes` is by name, in the buffer's order; `dtype` as torch names it."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.dtype: torch.dtype = getattr(torch, dtype)
        sizes = [torch.Size(shape).numel() * self.dtype.itemsize for shape in self.shapes.values()]
        self.num_bytes = sum(sizes)
        self._num_words = [-(-size // 8) for size in sizes]
        self._num_blocks = [-(-words // _BLOCK_WORDS) for words in self._num_words]
        self.buffer_words = sum(self._num_blocks) * _BLOCK_WORDS

    @classmethod
    def of(cls, layers: Mapping[str, LoraLayer], dtype: str) -> "AdapterLayout":
        shapes: dict[str, Sequence[int]] = {}
        for name, layer in layers.items():
            shapes |= {name + A: layer.a.shape, name + B: layer.b.shape}
        return cls(shapes, dtype)

    def wire(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch."), "shapes": {n: list(s) for n, s in self.shapes.items()}}

    def modules(self) -> list[str]:
        return [name.removesuffix(A) for name in self.shapes if name.endswith(A)]

    def new_buffer(self, device: torch.device) -> torch.Tensor:
        """`[buffer_words]` int64, zeros."""
        return torch.zeros(self.buffer_words, dtype=torch.int64, device=device)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tensor as a view of the buffer."""
        elements = buffer.view(self.dtype)
        views, start = {}, 0
        for (name, shape), blocks in zip(self.shapes.items(), self._num_blocks, strict=True):
            views[name] = elements[start : start + torch.Size(shape).numel()].view(shape)
            start += blocks * _BLOCK_WORDS * 8 // self.dtype.itemsize
        return views

    @torch.no_grad()
    def pack(self, layers: Mapping[str, LoraLayer], buffer: torch.Tensor) -> None:
        """Writes the layers into the buffer. Raises `SyncError` for a layer that is not finite, by name."""
        views = self.views(buffer)
        b, scaling = [layer.b.float() for layer in layers.values()], [layer.scaling for layer in layers.values()]
        copy_all([views[name + A] for name in layers], [layer.a for layer in layers.values()])
        copy_all([views[name + B] for name in layers], torch._foreach_mul(b, scaling))  # pyright: ignore
        if not buffer.view(self.dtype).isfinite().all():
            bad = [name for name, view in views.items() if not view.isfinite().all()]
            raise SyncError(f"{bad[0]} is not finite ({len(bad)} of {len(views)} tensors); nothing was published")

    def digests(self, buffer: torch.Tensor) -> dict[str, str]:
        """As in `receipt.py`, in one pass instead of one a tensor; waits for the device once.

        A word is eight bytes of the row-major bits, whatever the shape, the last one filled with zeros: adapters are
        digested whole, never by shards.
        """
        device = buffer.device
        counts = torch.tensor(self._num_blocks, device=device)
        sizes = torch.tensor(self._num_words, device=device)
        total = sum(self._num_blocks)
        owner = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=total)
        first = (torch.arange(total, device=device) - (counts.cumsum(0) - counts)[owner]) * _BLOCK_WORDS
        words, within = buffer.view(-1, _BLOCK_WORDS), torch.arange(_BLOCK_WORDS, device=device)
        sums = torch.zeros(len(counts), dtype=torch.int64, device=device)
        for start in range(0, total, _CHUNK_BLOCKS):
            chunk = slice(start, start + _CHUNK_BLOCKS)
            position = first[chunk, None] + within
            mixed = mixed_words(words[chunk], position)
            mixed.masked_fill_(position >= sizes[owner[chunk], None], 0)
            sums.index_add_(0, owner[chunk], mixed.sum(1))
        kind = str(self.dtype).removeprefix("torch.")
        values = zip(self.shapes.items(), sums.tolist(), strict=True)
        return {name: f"{kind}{list(shape)}:{value % (1 << 64):016x}" for (name, shape), value in values}


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Many small tensors in few kernels; one by one, a GPU would wait for Python."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def what_cannot_be_held(shapes: Mapping[str, Sequence[int]], held: Mapping[str, Any]) -> list[str]:
    """Faults of an adapter for an engine whose `EngineControl.adapters` says `held`; one a module."""
    modules: Mapping[str, Sequence[int]] = held["modules"]
    faults = []
    for name, (rank, num_inputs) in ((n.removesuffix(A), s) for n, s in shapes.items() if n.endswith(A)):
        size = [num_inputs, shapes[name + B][0]]
        if name not in modules:
            faults.append(f"{name}: the engine cannot adapt this module")
        elif list(modules[name]) != size:
            faults.append(f"{name}: {size[0]} inputs and {size[1]} outputs, in the engine {list(modules[name])}")
        elif rank > held["max_rank"]:
            faults.append(f"{name}: rank {rank} is above the engine's max_lora_rank = {held['max_rank']}")
    return faults


def listed(faults: Iterable[str], *, limit: int = 5) -> str:
    faults = list(faults)
    rest = [f"… and {len(faults) - limit} more"] if len(faults) > limit else []
    return "\n".join(faults[:limit] + rest)
