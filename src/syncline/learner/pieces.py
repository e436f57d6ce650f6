"""Tensors that ranks hold pieces of, on disk: a file a rank, written from what it holds, read by whoever needs what.

`optimizer-00001-of-00002.safetensors` says in its metadata of which whole, and from where on, each of its tensors is; a
file without that holds wholes. So nothing is gathered to be saved, and any number of ranks, split in any way, finds its
pieces again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from syncline.bridges.manifest import Shard
from syncline.bridges.ranks import Ranks


def write_pieces(shards: Mapping[str, Shard], folder: Path, stem: str, ranks: Ranks) -> Path:
    """This rank's file: what it alone holds, or holds first. Returns its path."""
    held = {name: shard for name, shard in shards.items() if shard.counted and shard.tensor.numel()}
    told = json.dumps({name: [shard.start, shard.shape] for name, shard in held.items()})
    tensors = {name: shard.tensor.detach().contiguous().cpu() for name, shard in held.items()}
    of_ranks = "" if ranks.world_size == 1 else f"-{ranks.rank:05d}-of-{ranks.world_size:05d}"
    path = folder / f"{stem}{of_ranks}.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "pieces": told})
    return path


def read_pieces(own: Mapping[str, Shard], folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """For each of `own` that was saved, a tensor on the CPU with its piece; what is nobody's is there too, empty.

    Raises `OSError` without files, `ValueError` naming what is saved in another shape or not in full.
    """
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there is no {stem}.safetensors")
    found: dict[str, torch.Tensor] = {}
    missing = {name: shard.tensor.numel() for name, shard in own.items()}
    for path in files:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("pieces", "{}"))
            for name in file.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
                saved = file.get_slice(name)
                start, whole = told.get(name, [[0] * len(saved.get_shape()), saved.get_shape()])
                if name not in own or list(whole) != list(own[name].shape):
                    found.setdefault(name, torch.empty(whole, device="meta"))
                    continue
                target = found.setdefault(name, torch.empty_like(own[name].tensor, device="cpu"))
                missing[name] -= _copy_overlap(target, own[name].start, saved, start)
    if short := [name for name in found if missing.get(name, 0) > 0]:
        raise ValueError(
            f"{short[0]} is not there in full ({len(short)} tensors are not): a rank's {stem} file is gone"
        )
    return found


def _copy_overlap(target: torch.Tensor, start: Sequence[int], saved: object, saved_start: Sequence[int]) -> int:
    """Copies what two pieces of one whole have in common; returns the number of elements."""
    sizes: Sequence[int] = saved.get_shape()  # pyright: ignore[reportAttributeAccessIssue]
    to, of = [], []
    for own, size, other, length in zip(start, target.shape, saved_start, sizes, strict=True):
        first, last = max(own, other), min(own + size, other + length)
        if first >= last:
            return 0
        to.append(slice(first - own, last - own))
        of.append(slice(first - other, last - other))
    part = saved[tuple(of)] if of else saved[...]  # pyright: ignore[reportIndexIssue]
    if part.dtype != target.dtype:
        raise ValueError(f"a tensor is {part.dtype} in the checkpoint and {target.dtype} in the run")
    target[tuple(to)] = part
    return part.numel()
