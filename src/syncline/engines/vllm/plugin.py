"""vLLM's `general_plugins` entry point: model loaders that leave the weights where they can be written.

vLLM's CPU build packs every linear layer's weight into a private oneDNN buffer at load and empties the parameter;
a later reload then leaves a tied `lm_head` stale, with the right checksums and the wrong logprobs. The loader below
keeps the weights in checkpoint layout and computes from them, so what is loaded (or written in place) is what is used.
It also takes MXFP4 experts, which it leaves in their blocks (`plain_experts`); on a GPU a loader of its own only
digests what is handed to vLLM of those. Several engines on one device sample from one copy: the owner's loader tells
where it lies, and the last one below reads no checkpoint, but waits for that and binds the parameters to it, before
anything is compiled or captured (`one_copy`).
"""

import dataclasses
import logging
import os
from importlib.metadata import entry_points
from typing import Any

import torch

from syncline.bridges.handles import bind, fingerprint_of, open_views
from syncline.bridges.receipt import whole
from syncline.engines.vllm import compat
from syncline.engines.vllm.one_copy import tell, told
from syncline.engines.vllm.packed_experts import witnessed
from syncline.engines.vllm.plain_experts import register_plain_experts
from syncline.errors import EngineError

GROUP = "vllm.general_plugins"
UNPACKED = "syncline_unpacked"
ATTACHED = "syncline_attached"
WITNESSED = "syncline_witnessed"
SCHEDULERS = "syncline.engines.vllm.schedulers"


def refuse_unregistered() -> None:
    """Raises `EngineError` when vLLM will not call `register` in the processes it starts, and would then know none of
    our loaders."""
    found = {entry.name for entry in entry_points(group=GROUP) if entry.value == f"{__name__}:register"}
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        raise EngineError(
            f"no installed distribution has the entry point {GROUP} = {__name__}:register, by which vLLM finds "
            "syncline's plugin: this package is on sys.path but not installed; run `make setup`, or `pip install .`"
        )
    if allowed is not None and not found & set(allowed.split(",")):
        raise EngineError(f"VLLM_PLUGINS = {allowed!r} leaves out {'/'.join(found)}; add it, or unset VLLM_PLUGINS")


def register() -> None:
    """Called by vLLM once in every process it starts. Its warning of schedulers it does not know is not for ours."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.platforms import current_platform

    logging.getLogger("vllm.config.scheduler").addFilter(lambda record: SCHEDULERS not in record.getMessage())
    if current_platform.is_cpu():
        register_plain_experts()
    witnessing = _witnessing_loader()
    unpacked = _unpacked_loader(witnessing)
    register_model_loader(WITNESSED)(witnessing)
    register_model_loader(UNPACKED)(unpacked)
    register_model_loader(ATTACHED)(_attached_loader(unpacked if current_platform.is_cpu() else witnessing))


def _witnessing_loader() -> type:
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class WitnessingLoader(DefaultModelLoader):
        """Reads like `auto`; keeps digests of what vLLM will repack. `one_copy` of `model_loader_extra_config`: whom to
        tell where the weights lie, or to ask."""

        def __init__(self, load_config: Any) -> None:
            extra = dict(load_config.model_loader_extra_config)
            self.one_copy = extra.pop("one_copy", {})
            super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config=extra))

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            if "port" in self.one_copy:
                tell(model, rank=get_tensor_model_parallel_rank(), **self.one_copy)
            return model

        def get_all_weights(self, model_config: Any, model: Any) -> Any:
            weights = super().get_all_weights(model_config, model)
            return witnessed(weights, model, quantisation=model_config.quantization)

    return WitnessingLoader


def _unpacked_loader(parent: Any) -> type:
    class UnpackedLoader(parent):
        """Linear layers and embeddings compute from their plain parameters."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            _leave_unpacked(model)
            super().load_weights(model, model_config)

    return UnpackedLoader


def _leave_unpacked(model: Any) -> None:
    """From now on: vLLM processes weights again after it has loaded others."""
    import torch.nn.functional as F
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    def compute_plainly(layer: Any) -> None:
        layer.cpu_linear = F.linear

    for name, module in model.named_modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            raise ValueError(f"{name}: mixture-of-experts layers are repacked by vLLM's CPU build; use a GPU")
        if isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            method.process_weights_after_loading = compute_plainly  # in place of packing them


def _attached_loader(parent: Any) -> type:
    class AttachedLoader(parent):
        """Waits for what the owner's rank of the same number tells, whose parameters vLLM names alike."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            from vllm.distributed import get_tensor_model_parallel_rank

            own = {name: whole(parameter) for name, parameter in model.named_parameters()}
            rank, device = get_tensor_model_parallel_rank(), next(iter(own.values())).tensor.device
            if device.type == "cpu":
                _leave_unpacked(model)
            exported, version = told(rank=rank, **self.one_copy), compat.vllm_version()
            theirs = open_views(exported, device=device, model=fingerprint_of(own), vllm_version=version)
            bind(own, theirs, rank=rank)
            torch.cuda.empty_cache()  # of what they were in until now, which nobody measures (`kv_cache_memory_bytes`)

    return AttachedLoader
