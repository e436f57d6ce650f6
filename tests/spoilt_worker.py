"""A worker whose rank 1 holds another adapter than it was sent, for as long as a file says so."""

import os
from pathlib import Path

from syncline.bridges.measure import Reading
from syncline.engines.vllm.slots import Held, Slots

SPOIL = "SYNCLINE_TEST_SPOIL"
"""Names the file, which holds what to spoil: `part`, `copy` or `padding`."""
PLACES = {
    "part": ("gate_up_proj", "lora_b_stacked", (0, 0)),
    "copy": ("gate_up_proj", "lora_a_stacked", (0, 0)),
    "padding": ("down_proj", "lora_a_stacked", (-1, 0)),
}


def install(folder: Path) -> None:
    """Makes this a plugin of every vLLM that has `folder` on its path."""
    about = folder / "spoilt_worker-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: spoilt_worker\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nspoilt_worker = spoilt_worker:spoil\n")


def spoil() -> None:
    """Between the loading of a slot and its digest, one number of it changes."""
    honest = Slots.read

    def read(slots: Slots, held: Held) -> Reading:
        from vllm.distributed import get_tensor_model_parallel_rank

        asked = Path(os.environ[SPOIL])
        if get_tensor_model_parallel_rank() == 1 and asked.exists():
            layer, stack, (row, column) = PLACES[asked.read_text()]
            slot = next(slot for slot, one in slots._held.items() if one is held)
            getattr(slots.manager.modules[f"model.layers.1.mlp.{layer}"], stack)[0][slot, 0, row, column] += 1
        return honest(slots, held)

    Slots.read = read
