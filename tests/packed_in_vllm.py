"""A process of its own: vLLM's Qwen2 with packed layers, loaded and adapted as its worker does, beside the learner's.

No engine is started, as in `gpt_oss_in_vllm`. `python tests/packed_in_vllm.py NAME=FOLDER …` prints a line of JSON for
each packed model, or what vLLM says against it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gpt_oss_in_vllm import SLOT_ID, TOKENS, learners, settings, slots_differ, vllms

from syncline.bridges.adapter import AdapterLayout
from syncline.bridges.measure import Measure
from syncline.bridges.receipt import Combination, differences, parameter_digests
from syncline.bridges.repacked import is_repacked
from syncline.engines.vllm.adapter_pieces import adaptable
from syncline.engines.vllm.layout import checkpoint_views
from syncline.engines.vllm.packed_experts import handed_to
from syncline.engines.vllm.slots import Slots
from syncline.learner.adapter import AdapterLayers, frozen_base


@torch.no_grad()
def layers_differ(config: Any, theirs: Any, manager: Any, learner: Any) -> dict[str, float]:
    """Relative difference of a layer's projections: each token under the adapter, and against the base alone."""
    from vllm.forward_context import set_forward_context
    from vllm.lora.layers import LoRAMapping

    x = torch.randn(TOKENS, 128).bfloat16()
    manager.set_adapter_mapping(LoRAMapping((SLOT_ID,) * TOKENS, (SLOT_ID,) * TOKENS, is_prefill=True))
    block, own = theirs.model.layers[1], learner.get_base_model().model.layers[1]
    with set_forward_context(None, config, num_tokens=TOKENS):
        found = torch.cat([block.self_attn.qkv_proj(x)[0], block.mlp(x)], dim=1).float()

    def plain() -> torch.Tensor:
        attention = own.self_attn
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x), own.mlp(x)]
        return torch.cat(parts, dim=1).float()

    adapted = plain()
    with learner.disable_adapter():
        base = plain()
    return {name: ((found - o).norm() / o.norm()).item() for name, o in (("adapted", adapted), ("base", base))}


def shown(path: Path) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config

    config = settings(path)
    with set_current_vllm_config(config):
        model, manager = vllms(config)
        measure = Measure(checkpoint_views)
        reading = measure.read(model)
        told = Combination([measure.pieces]).digests([reading.digests]) | handed_to(model)
        learner = learners(path)
        plain, stored = frozen_base(path)
        base = parameter_digests(plain(learner)) | dict(stored(learner))
        layers = dict(AdapterLayers()(learner))
        slots, layout = Slots(manager, adaptable(manager)), AdapterLayout.of(layers, "bfloat16")
        return {
            "base": differences(base, {name: digest for name, digest in told.items() if not is_repacked(name)}),
            "repacked": sorted({name.rpartition(".")[2] for name in told if is_repacked(name)}),
            "slots": slots_differ(slots, layout, layers),
            "layers": layers_differ(config, model, manager, learner),
        }


def main() -> None:
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        try:
            found = shown(Path(folder))
        except (ValueError, AssertionError, RuntimeError) as error:  # vLLM's refusals
            found = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # as `arguments.set_environment` does
    main()
    os._exit(0)  # vLLM's process group has no end of its own
