"""vLLM's `general_plugins` entry point: a model loader for CPUs that leaves weights where they can be replaced.

vLLM's CPU build packs every linear layer's weight into a private oneDNN buffer at load and empties the parameter;
a later reload then leaves a tied `lm_head` stale, with the right checksums and the wrong logprobs. The loader below
keeps the weights in checkpoint layout and computes from them, so what is loaded (or written in place) is what is used.
"""

import dataclasses
from typing import Any

LOAD_FORMAT = "syncline_unpacked"


def register() -> None:
    """Called by vLLM once in every process it starts."""
    from vllm.model_executor.model_loader import register_model_loader

    register_model_loader(LOAD_FORMAT)(_loader_class())


def _loader_class() -> type:
    import torch.nn.functional as F
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class UnpackedLoader(DefaultModelLoader):
        """Reads like `auto`; linear layers and embeddings compute from their plain parameters."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="auto"))

        def load_weights(self, model: Any, model_config: Any) -> None:
            for name, module in model.named_modules():
                if isinstance(getattr(module, "quant_method", None), UnquantizedFusedMoEMethod):
                    raise ValueError(f"{name}: mixture-of-experts layers are repacked by vLLM's CPU build; use a GPU")
                if isinstance(module, LinearBase):
                    module._cpu_skip_gemm_dispatch = True  # pyright: ignore[reportArgumentType]
            super().load_weights(model, model_config)

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            for module in model.modules():
                if isinstance(module, VocabParallelEmbedding):
                    module.cpu_linear = F.linear  # pyright: ignore[reportArgumentType]
            return model

    return UnpackedLoader
