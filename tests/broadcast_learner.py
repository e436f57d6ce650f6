"""A learner that begins to broadcast a version and never ends: to be killed in the middle of it.

python tests/broadcast_learner.py ENGINE_URL MODEL_PATH DEVICE VERSION
"""

import sys
import threading
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM

from syncline.bridges.broadcast import BroadcastBridge
from syncline.config.schema import Bridge
from syncline.engines.client import EngineController

BUCKET_VALUES = 50_000


def main() -> None:
    url, path, device, version = sys.argv[1:]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    bucket_bytes = BUCKET_VALUES * dtype.itemsize
    reads: list[int] = []

    def export(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The sending is the fourth reading: one is at the attach, two are the digest's, which then needs no more. In
        the fourth of its buckets, since the third is packed where the first was, once the engine has that one."""
        reads.append(0)
        sent = 0
        for name, parameter in model.named_parameters():
            if len(reads) == 4 and sent > 3 * bucket_bytes:
                print("sending", flush=True)
                threading.Event().wait()
            sent += parameter.numel() * parameter.element_size()
            yield name, parameter

    engine = EngineController(url, timeout_seconds=60)
    bridge = BroadcastBridge([engine], Bridge(name="broadcast", bucket_bytes=bucket_bytes), export=export)
    bridge.attach(model)
    bridge.publish(model, policy_version=int(version))


if __name__ == "__main__":
    main()
