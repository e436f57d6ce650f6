"""A learner that begins a step, writes half of its weights and never ends: to be killed in the middle of it.

python tests/killed_learner.py BRIDGE ENGINE_URL MODEL_PATH FOLDER
"""

import sys
import threading
from pathlib import Path

import torch
from test_weight_bridge import Side

from syncline.engines.client import EngineController


def main() -> None:
    name, url, path, folder = sys.argv[1:]
    engine = EngineController(url, timeout_seconds=60)
    side = Side(name, engine, Path(path), Path(folder))
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    with bridge.updating(), torch.no_grad():
        for parameter in trained[: len(trained) // 2]:
            parameter.add_(torch.randn_like(parameter) * 0.05)
        print("updating", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
