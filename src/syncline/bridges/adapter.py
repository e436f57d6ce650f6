"""A LoRA adapter as one flat buffer: which tensor lies where, and the digest of each; the same on both sides.

Both sides hold it as the engine computes with it: in the engine's type, B already multiplied by its layer's scaling
(`alpha / rank`, `alpha / sqrt(rank)` for rsLoRA). So the digests compare bits, and the engine has nothing to round.
The learner's is whole; a tensor-parallel engine's ranks hold pieces of it, whose digests add up (`blocks.py`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from syncline.bridges.blocks import Blocks, Packed, copy_all
from syncline.errors import SyncError

A, B = ".lora_A.weight", ".lora_B.weight"


class LoraLayer(NamedTuple):
    """One adapted linear layer: y = W x + scaling · B (A x). Of fused experts all at once: their number comes first."""

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
        self._blocks = Blocks(list(self.shapes.values()), self.dtype)
        self.num_bytes, self.buffer_words = self._blocks.num_bytes, self._blocks.buffer_words
        self.text = json.dumps([dtype, self.shapes])
        """As one string, which passes from process to process without being taken apart."""

    @classmethod
    def of(cls, layers: Mapping[str, LoraLayer], dtype: str) -> "AdapterLayout":
        shapes: dict[str, Sequence[int]] = {}
        for name, layer in layers.items():
            shapes |= {name + A: layer.a.shape, name + B: layer.b.shape}
        return cls(shapes, dtype)

    @classmethod
    def from_text(cls, text: str) -> "AdapterLayout":
        """Raises `SyncError` for what no layout says of itself."""
        try:
            dtype, shapes = json.loads(text)
            return cls(shapes, dtype)
        except (AttributeError, TypeError, ValueError) as error:
            raise SyncError(f"not the layout of an adapter ({error}): {text[:100]}") from error

    def modules(self) -> list[str]:
        return [name.removesuffix(A) for name in self.shapes if name.endswith(A)]

    def new_buffer(self, device: torch.device) -> torch.Tensor:
        """`[buffer_words]` int64, zeros."""
        return self._blocks.new_buffer(device)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tensor as a view of the buffer."""
        return dict(zip(self.shapes, self._blocks.views(buffer), strict=True))

    def on(self, buffer: torch.Tensor) -> "PackedAdapter":
        """The buffer, to be packed and digested again and again."""
        return PackedAdapter(self, Packed(self._blocks, buffer))


class PackedAdapter:
    """The learner's adapter in its buffer."""

    def __init__(self, layout: AdapterLayout, packed: Packed) -> None:
        self.layout = layout
        self._packed = packed
        self._views = dict(zip(layout.shapes, packed.views, strict=True))

    @torch.no_grad()
    def pack(self, layers: Mapping[str, LoraLayer]) -> None:
        """Writes the layers into the buffer."""
        b, scaling = [layer.b.float() for layer in layers.values()], [layer.scaling for layer in layers.values()]
        copy_all([self._views[name + A] for name in layers], [layer.a for layer in layers.values()])
        copy_all([self._views[name + B] for name in layers], torch._foreach_mul(b, scaling))  # pyright: ignore

    def digests(self) -> dict[str, str]:
        """`name -> "dtype[shape]:digest"`, as `receipt.Combination` says it of pieces that several ranks hold. Raises
        `SyncError` for a tensor that is not finite, by name."""
        values, num_broken = self._packed.sums()
        if any(num_broken):
            bad = [name for name, number in zip(self.layout.shapes, num_broken, strict=True) if number]
            raise SyncError(f"{bad[0]} is not finite ({len(bad)} of {len(num_broken)} tensors); it is never published")
        kind = str(self.layout.dtype).removeprefix("torch.")
        found = zip(self.layout.shapes.items(), values, strict=True)
        return {name: f"{kind}{list(shape)}:{value:016x}" for (name, shape), value in found}


def what_cannot_be_held(shapes: Mapping[str, Sequence[int]], held: Mapping[str, Any]) -> list[str]:
    """Faults of an adapter for an engine whose `EngineControl.adapters` says `held`; one a module."""
    modules: Mapping[str, Sequence[int]] = held["modules"]
    faults = []
    for name, (*experts, rank, num_inputs) in ((n.removesuffix(A), s) for n, s in shapes.items() if n.endswith(A)):
        size = [*experts, num_inputs, shapes[name + B][-2]]
        if name not in modules:
            faults.append(f"{name}: the engine cannot adapt this module")
        elif list(modules[name]) != size:
            faults.append(f"{name}: {size[-2]} inputs and {size[-1]} outputs, in the engine {list(modules[name])}")
        elif rank > held["max_rank"]:
            faults.append(f"{name}: rank {rank} is above the engine's max_lora_rank = {held['max_rank']}")
    return faults


def listed(faults: Iterable[str], *, limit: int = 5) -> str:
    faults = list(faults)
    rest = [f"… and {len(faults) - limit} more"] if len(faults) > limit else []
    return "\n".join(faults[:limit] + rest)
