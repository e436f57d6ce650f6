"""A process of its own: vLLM's GPT-OSS, loaded and adapted as its worker does it, beside the learner's. Prints JSON.

No engine is started: no scheduler, no cache, no other processes. `python tests/gpt_oss_in_vllm.py MODEL`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rank_digests import combined_together

from syncline.bridges.adapter import AdapterLayout, what_cannot_be_held
from syncline.bridges.measure import Measure
from syncline.bridges.receipt import Combination, differences, parameter_digests
from syncline.bridges.repacked import is_repacked
from syncline.config.schema import Lora, Model
from syncline.engines.vllm.adapter_pieces import adaptable
from syncline.engines.vllm.layout import checkpoint_views
from syncline.engines.vllm.packed_experts import handed_to
from syncline.engines.vllm.plugin import UNPACKED
from syncline.engines.vllm.slots import Slots
from syncline.learner.adapter import AdapterLayers, base_parameters, plain_parameters
from syncline.learner.model import load_model, trainable_parameters
from syncline.learner.mxfp4 import stored_experts

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SLOT_ID, TOKENS = 77, 10


def settings(path: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(path),
        dtype="bfloat16",
        load_format=UNPACKED,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        max_num_seqs=8,
        max_num_batched_tokens=256,
    ).create_engine_config()


def vllms(config: Any) -> tuple[Any, Any]:
    """The model, and what holds its adapters."""
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.model_executor.model_loader import get_model_loader

    torch.accelerator.empty_cache = lambda: None  # as the CPU worker does
    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/meet", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    model = get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    vocabulary = config.model_config.get_vocab_size()
    return model, LRUCacheLoRAModelManager(model, 8, 256, vocabulary, config.lora_config, torch.device("cpu"), config)


def learners(path: Path, **targets: Any) -> Any:
    torch.manual_seed(0)
    lora = Lora(rank=4, alpha=8, **targets)
    model = load_model(Model(path=str(path), dtype="bfloat16", lora=lora), device=torch.device("cpu"))
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def experts_differ(config: Any, theirs: Any, manager: Any, learner: Any) -> dict[str, float]:
    """Relative difference of a layer's experts: each token under the adapter, and against the base alone."""
    from vllm.forward_context import set_forward_context
    from vllm.lora.layers import LoRAMapping

    x = torch.randn(TOKENS, 256).bfloat16()
    manager.set_adapter_mapping(LoRAMapping((SLOT_ID,) * TOKENS, (SLOT_ID,) * TOKENS, is_prefill=True))
    with set_forward_context(None, config, num_tokens=TOKENS):
        found = theirs.model.layers[0].mlp(x).float()
    own = learner.get_base_model().model.layers[0].mlp
    adapted = own(x[None])[0][0].float()
    with learner.disable_adapter():
        plain = own(x[None])[0][0].float()
    return {
        name: ((found - other).norm() / other.norm()).item() for name, other in (("adapted", adapted), ("base", plain))
    }


def slots_differ(slots: Slots, layout: AdapterLayout, layers: dict[str, Any]) -> list[str]:
    """What a slot holds otherwise than the learner does, once it is loaded."""
    buffer = layout.new_buffer(torch.device("cpu"))
    packed = layout.on(buffer)
    packed.pack(layers)
    held = slots.load(SLOT_ID, layout, layout.views(buffer))
    slots.read(held)
    return differences(packed.digests(), combined_together([held.pieces]))


def packed_by_a_reload(config: Any, model: Any) -> list[str]:
    """Layers that no longer compute from their parameters once vLLM has processed loaded weights again."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    linear = torch.nn.functional.linear
    return [name for name, layer in model.named_modules() if getattr(layer, "cpu_linear", linear) is not linear]


def main(path: Path) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config

    config = settings(path)
    with set_current_vllm_config(config):
        model, manager = vllms(config)
        measure = Measure(checkpoint_views)
        reading = measure.read(model)
        told = Combination([measure.pieces]).digests([reading.digests]) | handed_to(model)
        learner = learners(path, target_parameters=EXPERTS)
        base = parameter_digests(plain_parameters(learner)) | stored_experts(dict(base_parameters(learner)), path)
        layers = dict(AdapterLayers()(learner))
        slots, layout = Slots(manager, adaptable(manager)), AdapterLayout.of(layers, "bfloat16")
        return {
            "base": differences(base, {name: digest for name, digest in told.items() if not is_repacked(name)}),
            "repacked": sorted(name.rpartition(".")[2] for name in told if is_repacked(name)),
            "cannot": what_cannot_be_held(layout.shapes, {"modules": slots.sizes, "max_rank": 8}),
            "slots": slots_differ(slots, layout, layers),
            "experts": experts_differ(config, model, manager, learner),
            "packed": packed_by_a_reload(config, model),
        }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
    os._exit(0)  # vLLM's process group has no end of its own
