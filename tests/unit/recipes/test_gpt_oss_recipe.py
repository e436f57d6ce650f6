"""The recipe's variables become fields, and its configurations are whole."""

from pathlib import Path

import pytest
from gpt_oss_models import recipe

from syncline.config import load
from syncline.config.model_folder import packed_faults

train = recipe("train_grpo_vllm")
CONFIGS = Path(__file__).parents[3] / "configs"


def test_variables_say_where_the_server_is_and_what_computes_attention() -> None:
    variables = {"VLLM_SERVER_HOST": "h", "VLLM_SERVER_PORT": "9", "VLLM_TENSOR_PARALLEL_SIZE": "2"}
    assert train.overrides(variables)[0].startswith("engine={servers: [{url: http://h:9, tensor_parallel_size: 2}]")
    assert "servers: [{url: http://localhost:8000, tensor_parallel_size: 1}]" in train.overrides({})[0]
    assert "url: http://a:1" in train.overrides(variables | {"VLLM_SERVER_BASE_URL": "http://a:1"})[0]
    hub = {"ATTN_IMPLEMENTATION": "kernels-community/vllm-flash-attn3"}
    assert "learner.attention=kernels-community/vllm-flash-attn3,auto" in train.overrides(hub)
    assert "observe.completions_csv=runs/micro_step_completions.csv" in train.overrides({})
    assert not any("completions_csv" in field for field in train.overrides({"GRPO_LOG_COMPLETIONS": "0"}))


@pytest.mark.parametrize("name", ["gpt_oss_20b", "gpt_oss_small"])
def test_the_configurations_load(name: str) -> None:
    config = load(CONFIGS / f"{name}.yaml", [])
    assert config.observe.training_log
    assert config.model.lora is not None
    assert len(config.model.lora.target_parameters) == 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ([], None),
        (["bridge.name=restart"], "bridge.name: 'restart' would write weights into a base of MXFP4"),
        (["bridge.name=broadcast"], "bridge.name to lora, which moves the adapter alone"),
        (["model.dtype=float32"], "model.dtype: 'float32'"),
        (["model.dtype=auto"], "model.dtype: 'auto' may be float32"),
    ],
)
def test_what_a_packed_base_cannot_be_used_with_is_refused_before_anything_starts(
    tmp_path: Path, change: list[str], fault: str | None
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    values = ["engine.device=cpu", "learner.device=cpu", f"model.path={folder}"]
    faults = packed_faults(load(CONFIGS / "gpt_oss_small.yaml", [*values, *change]))
    assert (fault is None and not faults) or any(str(fault) in one for one in faults)
