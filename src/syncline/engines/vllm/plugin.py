"""vLLM's `general_plugins` entry point: model loaders that leave the weights where they can be written.

vLLM's CPU build packs every linear layer's weight into a private oneDNN buffer at load and empties the parameter;
a later reload then leaves a tied `lm_head` stale, with the right checksums and the wrong logprobs. The loader below
keeps the weights in checkpoint layout and computes from them, so what is loaded (or written in place) is what is used.
It also takes MXFP4 experts, which it leaves in their blocks (`plain_experts`); on a GPU a loader of its own only
digests what is handed to vLLM of those. The last loader reads no checkpoint: it binds the parameters, before anything
is compiled or captured, to those of another engine on the same device, so that several engines sample from one copy.
"""

import dataclasses
import os
from importlib.metadata import entry_points
from typing import Any

from syncline.engines.vllm.packed_experts import witnessed
from syncline.engines.vllm.plain_experts import register_plain_experts
from syncline.errors import EngineError

GROUP = "vllm.general_plugins"
UNPACKED = "syncline_unpacked"
ATTACHED = "syncline_attached"
WITNESSED = "syncline_witnessed"


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
    """Called by vLLM once in every process it starts."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        register_plain_experts()
    witnessing = _witnessing_loader()
    unpacked = _unpacked_loader(witnessing)
    register_model_loader(WITNESSED)(witnessing)
    register_model_loader(UNPACKED)(unpacked)
    register_model_loader(ATTACHED)(_attached_loader(unpacked))


def _witnessing_loader() -> type:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class WitnessingLoader(DefaultModelLoader):
        """Reads like `auto`; keeps digests of what vLLM will repack."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="auto"))

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


def _attached_loader(unpacked: type) -> type:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    parent: Any = unpacked if on_cpu else DefaultModelLoader

    class AttachedLoader(parent):
        """`model_loader_extra_config` holds the export of each of the owner's ranks (`bridges.handles`), under vLLM's
        own parameter names."""

        def __init__(self, load_config: Any) -> None:
            self._ranks = load_config.model_loader_extra_config["ranks"]
            super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))

        def load_weights(self, model: Any, model_config: Any) -> None:
            from vllm.distributed import get_tensor_model_parallel_rank

            from syncline.bridges.handles import bind, fingerprint_of, open_views
            from syncline.bridges.receipt import whole
            from syncline.engines.vllm import compat

            if on_cpu:
                _leave_unpacked(model)
            own = {name: whole(parameter) for name, parameter in model.named_parameters()}
            rank, device = get_tensor_model_parallel_rank(), next(iter(own.values())).tensor.device
            version, fingerprint = compat.vllm_version(), fingerprint_of(own)
            theirs = open_views(self._ranks[rank], device=device, model=fingerprint, vllm_version=version)
            bind(own, theirs, rank=rank)

    return AttachedLoader
