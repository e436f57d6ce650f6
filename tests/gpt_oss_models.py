"""The recipe's small GPT-OSS with MXFP4 experts, for tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from real_engine import vllm_has

needs_experts = pytest.mark.skipif(
    not torch.cuda.is_available()
    and not vllm_has("def _make_moe_method", "model_executor/layers/quantization/mxfp4.py"),
    reason="the CPU build of this vLLM serves no adapters of MXFP4 experts: use a newer one",
)


def recipe(name: str) -> ModuleType:
    """A module of `recipes/gpt_oss`."""
    path = Path(__file__).parents[1] / "recipes" / "gpt_oss" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"gpt_oss_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
