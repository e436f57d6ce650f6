"""The digest of a model's weights: equal on both sides, or the sync has failed.

A parameter's digest is the sum, modulo 2**64, of a mixed 64-bit word for each eight bytes of its row-major bits and
their position in the full tensor. A sum of position-mixed words has two properties a plain hash lacks: it runs at
memory speed where the tensor lies, and the digests of disjoint shards add up to the digest of the whole, so tensor-
parallel ranks prove their shards without gathering them. The mixer is splitmix64 (Steele, Lea, Flood 2014, "Fast
splittable pseudorandom number generators"). It catches faults (stale, swapped, truncated, half-written tensors);
it does not withstand somebody who crafts a collision.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_CHUNK_WORDS = 1 << 24


def tensor_digest(tensor: torch.Tensor, *, offset: int = 0) -> int:
    """The 64-bit digest of a tensor's bits; `offset` counts the elements before it in the full row-major tensor.

    Shards of whole rows have digests that add up (modulo 2**64) when rows are a multiple of eight bytes.
    """
    return int(_digest(tensor.detach(), offset)) % (1 << 64)


def parameter_digests(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """`name -> "dtype[shape]:digest"`, which names what differs when two sides disagree.

    All digests leave the device in one transfer, so a GPU is waited for once, not once a parameter.
    """
    kinds: dict[str, str] = {}
    digests: list[torch.Tensor] = []
    for name, tensor in named:
        kinds[name] = kind_of(tensor)
        digests.append(_digest(tensor.detach(), 0))
    values = torch.stack(digests).tolist() if digests else []
    return {name: f"{kind}:{value % (1 << 64):016x}" for (name, kind), value in zip(kinds.items(), values, strict=True)}


def kind_of(tensor: torch.Tensor) -> str:
    """`bfloat16[151936, 896]`: what two sides must agree on before any weights move."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def model_digest(parameters: Mapping[str, str]) -> str:
    """One digest over all parameters, independent of their order."""
    lines = "\n".join(f"{name}={digest}" for name, digest in sorted(parameters.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def differences(learner: Mapping[str, str], engine: Mapping[str, str], *, limit: int = 5) -> list[str]:
    """What differs between two sides, a line a parameter, at most `limit` lines and a count of the rest."""
    lines = [f"{name}: missing in the engine" for name in sorted(learner.keys() - engine.keys())]
    lines += [f"{name}: not in the learner" for name in sorted(engine.keys() - learner.keys())]
    lines += [
        f"{name}: learner {learner[name]}, engine {engine[name]}"
        for name in sorted(learner.keys() & engine.keys())
        if learner[name] != engine[name]
    ]
    rest = len(lines) - limit
    return lines[:limit] + ([f"… and {rest} more"] if rest > 0 else [])


def _digest(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The digest as a 0-d int64 tensor where `tensor` lies."""
    words, first = _words(tensor, offset)
    if words.is_cuda:
        from syncline.bridges.digest_kernel import mixed_sum

        return mixed_sum(words, first)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        position = torch.arange(first + start, first + start + chunk.numel(), device=chunk.device)
        total += mixed_words(chunk, position).sum()
    return total


def mixed_words(words: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Each int64 word mixed with its position in the full tensor; a tensor's digest is their sum."""
    return _mix(words ^ (position * _GOLDEN))


def _words(tensor: torch.Tensor, offset: int) -> tuple[torch.Tensor, int]:
    """The bits as int64 words and the index of the first; odd sizes go word by element."""
    flat = tensor.contiguous().view(-1)
    per_word = 8 // flat.element_size()
    row = tensor.shape[-1] if tensor.dim() else 1
    if row % per_word == 0 and offset % per_word == 0:
        return flat.view(torch.int64), offset // per_word
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(integers).to(torch.int64), offset


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 (torch shifts arithmetically, so the sign bits are masked off)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
