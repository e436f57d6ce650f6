"""A worker whose rank 1 holds another adapter than it was sent, for as long as a file says so."""

import os
from pathlib import Path
from typing import Any

from syncline.engines.vllm import compat
from syncline.engines.vllm.worker import WorkerExtension

SPOIL = "SYNCLINE_TEST_SPOIL"
"""Names the file, which holds what to spoil: `part`, `copy` or `padding`."""
PLACES = {
    "part": ("gate_up_proj", "lora_b_stacked", (0, 0)),
    "copy": ("gate_up_proj", "lora_a_stacked", (0, 0)),
    "padding": ("down_proj", "lora_a_stacked", (-1, 0)),
}


class SpoiltWorker(WorkerExtension):
    """Between the loading of a slot and its digest, one number of it changes."""

    def _digests(self, adapter_id: int) -> dict[str, Any]:
        asked = Path(os.environ[SPOIL])
        if self.rank == 1 and asked.exists():
            manager = compat.adapter_manager(self.model_runner)
            layer, stack, (row, column) = PLACES[asked.read_text()]
            held = getattr(manager.modules[f"model.layers.1.mlp.{layer}"], stack)[0]
            held[manager.lora_index_to_id.index(adapter_id), 0, row, column] += 1
        return super()._digests(adapter_id)
