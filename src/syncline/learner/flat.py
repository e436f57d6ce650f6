"""Several tensors as one, so that a step over hundreds of small ones launches a few kernels, not a few for each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, one after the other. A single contiguous tensor is its own, and not copied."""
    return tensors[0].contiguous().view(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The views of `flat` where `joined` had put each."""
    return list(flat.split([tensor.numel() for tensor in tensors]))


def spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Back to where `joined` had it from, in place."""
    if flat.data_ptr() != tensors[0].data_ptr():
        views = [part.view(tensor.shape) for part, tensor in zip(parts(flat, tensors), tensors, strict=True)]
        torch._foreach_copy_(list(tensors), views)  # pyright: ignore[reportPrivateImportUsage]
