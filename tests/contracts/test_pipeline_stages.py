"""An engine of two pipeline stages proves every layer, through each bridge that serves it."""

from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model, run_values, running_engine
from test_weight_bridge import BRIDGES, DEVICE, DTYPE, TOLERANCE, Side
from transformers import AutoModelForCausalLM

from syncline.config.schema import Bridge

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_every_stage_takes_and_proves_each_version(tmp_path: Path) -> None:
    model_path = make_tiny_model(tmp_path / "model")
    values = run_values(model_path, tmp_path / "run")
    values["engine"] |= {"extra": values["engine"].get("extra", {}) | {"pipeline_parallel_size": 2}}
    if DEVICE == "cuda":
        values["engine"]["devices"] = [0, 1]
    with running_engine(values, tmp_path / "engine") as engine:
        version = 0
        for name in ("restart", "broadcast"):
            side = Side(name, engine, model_path, tmp_path)
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPE).to(DEVICE)
            side.model = model
            bridge = BRIDGES[name](side, Bridge(name=name))
            bridge.attach(model)
            for _ in range(2):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.05)
                report = bridge.publish(model, policy_version=version)
                assert engine.receipt() == report.receipt
                assert side.mismatch() < TOLERANCE
                version += 1
            bridge.close()
