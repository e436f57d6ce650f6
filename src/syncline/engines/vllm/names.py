"""vLLM's parameter names → the ones a learner's transformers model has.

vLLM maps checkpoint names to its own (`hf_to_vllm_mapper`), forwards only; the way back is tried through the same
tables and kept if the way forwards leads to the parameter again. transformers in turn renames what old checkpoints
call otherwise (`.block_sparse_moe.` → `.mlp.`), and its own table is applied too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from syncline.errors import SyncError


class CheckpointNames:
    """See the module."""

    def __init__(self, model: Any) -> None:
        self.packed = _packed(model)
        """Name of a layer that vLLM fuses → names of the checkpoint's layers in it, in order."""
        self._mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._loaded: frozenset[str] = getattr(model, "syncline_loaded", frozenset())
        """What the checkpoint was seen to hold, where a name could have come from several; empty: nobody looked."""
        self._sees = getattr(getattr(model, "config", None), "vision_config", None) is not None
        self._renames = _transformers_renames(getattr(getattr(model, "config", None), "model_type", None))

    def of(self, piece: str, parameter: str) -> str:
        """The learner's name of `piece`, which lies in vLLM's `parameter`. Raises `SyncError` when no table has it."""
        name = piece if self._mapper is None or _is_expert(parameter) else self._reversed(piece, parameter)
        for renaming in self._renames:
            name, _ = renaming.rename_source_key(name)
        return name

    def _reversed(self, piece: str, parameter: str) -> str:
        mapper: Any = self._mapper
        candidates = [piece, *_candidates(piece, mapper)]
        if self._sees:  # whose mapper also takes the names of older checkpoints, which are vLLM's own
            candidates.append(candidates.pop(0))
        # a part's own mapper, or the model's own loader, may do the fusing
        ways = [name for name in candidates if mapper.apply_list([name]) in ([parameter], [piece])]
        if ways:
            seen = [name for name in ways if name in self._loaded and not self._sees]
            return (seen or ways)[0]
        raise SyncError(f"{piece}: vLLM loads {parameter} under a name that its hf_to_vllm_mapper cannot be asked for")


def _packed(model: Any) -> dict[str, list[str]]:
    """The model's table, or, where a model of several parts has none, its language model's (Qwen2-VL)."""
    inner = getattr(model, "language_model", None)
    return getattr(model, "packed_modules_mapping", None) or getattr(inner, "packed_modules_mapping", {})


def _candidates(name: str, mapper: Any) -> Iterator[str]:
    """Each way back through one entry of the mapper's tables."""
    for before, after in _renamed(mapper.orig_to_new_prefix):
        if name.startswith(after):
            yield before + name.removeprefix(after)
    for before, after in _renamed(mapper.orig_to_new_suffix):
        if name.endswith(after):
            yield name.removesuffix(after) + before
    for before, after in _renamed(mapper.orig_to_new_substr):
        if after and after in name:
            yield name.replace(after, before, 1)


def _renamed(table: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Entries that map to `None` are weights that vLLM does not load."""
    return ((before, after) for before, after in table.items() if after is not None)


def _is_expert(parameter: str) -> bool:
    return ".experts." in parameter


def _transformers_renames(model_type: str | None) -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    entries = get_checkpoint_conversion_mapping(model_type) or []
    return [entry for entry in entries if isinstance(entry, WeightRenaming)]
