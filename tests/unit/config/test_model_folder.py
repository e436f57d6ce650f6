"""What a packed checkpoint may be used with, read off its config.json."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import try_to_load_from_cache
from packed_models import SETTINGS

from syncline.cli import main
from syncline.config import load
from syncline.config.model_folder import known_settings, model_faults, quantisation
from syncline.errors import ConfigError

TEXT = """
run: {dir: runs/x, num_steps: 10, groups_per_step: 4}
model: {path: x, max_length: 128, dtype: bfloat16, lora: {rank: 4}}
sampling: {max_tokens: 16}
environments: [{task: arithmetic}]
bridge: {name: lora}
engine: {device: cpu}
learner: {token_budget: 512, device: cpu}
"""
PACKED = {name: settings for name, (_, settings) in SETTINGS.items()}


def faults(folder: Path, settings: dict[str, Any], *overrides: str) -> list[str]:
    return faults_of(folder, {"quantization_config": settings}, *overrides)


def faults_of(folder: Path, settings: dict[str, Any], *overrides: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "run.yaml").write_text(TEXT)
    return model_faults(load(folder / "run.yaml", [f"model.path={folder}", *overrides]))


@pytest.mark.parametrize("name", sorted(PACKED.keys() - {"fp8"}))
def test_an_adapter_over_a_packed_base_is_what_it_can_be_used_with(tmp_path: Path, name: str) -> None:
    assert faults(tmp_path, PACKED[name]) == []
    assert quantisation(str(tmp_path)) == PACKED[name]["quant_method"]


@pytest.mark.parametrize("name", ["gptq", "awq", "w4a16", "fp8-channel"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (["bridge.name=restart"], "bridge.name: 'restart' would write weights into a base of "),
        (["bridge.name=broadcast"], "set model.lora, and bridge.name to lora, which moves the adapter alone"),
        (["bridge.name=shared"], "bridge.name: 'shared' would write weights"),
        (["bridge.name=restart", "model.lora=null"], "bridge.name: 'restart' would write weights"),
        (["model.dtype=float32"], "model.dtype: 'float32' may be float32, and vLLM computes "),
        (["learner.data_parallel_size=2"], "learner.data_parallel_size: 2 leaves a rank a part of the weights"),
    ],
)
def test_anything_else_names_the_bridge_that_can(tmp_path: Path, name: str, change: list[str], fault: str) -> None:
    [found] = faults(tmp_path, PACKED[name], *change)
    assert fault in found
    assert PACKED[name]["quant_method"] in found


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gptq", {"desc_act": True}, "with desc_act, and vLLM takes no groups whose inputs are reordered"),
        ("gptq", {"sym": False}, "with sym = false"),
        ("gptq", {"bits": 8}, "with bits = 8, and vLLM's kernels take 4, on a GPU 8 too"),
        ("gptq", {"bits": 3}, "with bits = 3"),
        ("gptq", {"lm_head": True}, "its output layer too"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "(dynamic)"),
        ("awq", {"version": "gemv"}, "in the layout gemm"),
        ("awq", {"zero_point": False}, "four bits with zero points"),
        ("fp8", {}, "by blocks, whose weights vLLM's kernels for them may quantise again"),
        ("fp8", {"weight_block_size": None}, "with one scale a layer, and vLLM quantises layers that it fuses again"),
        ("w4a16", {"format": "marlin-24"}, "one group of float-quantized by channel, or of pack-quantized"),
        ("w4a16", {"config_groups": {}}, "one group of"),
        ("w4a16", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "its KV cache too"),
        ("fp8", {"quant_method": "bitsandbytes"}, "no bridge has been shown to prove such a base"),
    ],
)
def test_a_packing_under_which_values_would_differ_is_refused_with_the_reason(
    tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    [fault] = faults(tmp_path, PACKED[name] | change)
    assert fault.startswith(f"model.path: '{tmp_path}' is quantised by ")
    assert reason in fault
    assert fault.endswith("give the model it was made from, or one packed otherwise")


def test_reordered_inputs_of_one_group_are_no_reordering(tmp_path: Path) -> None:
    assert faults(tmp_path, PACKED["gptq"] | {"desc_act": True, "group_size": -1}) == []


def test_layers_left_out_are_no_settings_of_their_own(tmp_path: Path) -> None:
    assert faults(tmp_path, PACKED["gptq"] | {"dynamic": {"-:.*down_proj": {}}}) == []


SEES = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 32}}
WHOLE = ("model.lora=null", "bridge.name=restart")


@pytest.mark.parametrize("field", ["tensor_parallel_size", "data_parallel_size"])
def test_a_tower_over_several_ranks_is_refused_before_anything_starts(tmp_path: Path, field: str) -> None:
    assert faults_of(tmp_path, SEES, *WHOLE) == []
    assert faults_of(tmp_path, {"model_type": "qwen2"}, *WHOLE, f"learner.{field}=3") == []
    [fault] = faults_of(tmp_path, SEES, *WHOLE, f"learner.{field}=3")
    assert fault == (
        f"learner.{field}: 3 ranks do not share the vision tower of model.path = '{tmp_path}' (qwen2_5_vl); set it to 1"
    )


def test_the_command_that_starts_a_run_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults_of(tmp_path, SEES)
    words = [f"model.path={tmp_path}", *WHOLE, "learner.data_parallel_size=2"]
    for verb in ("check", "run"):
        assert main([verb, str(tmp_path / "run.yaml"), *words, f"run.dir={tmp_path / 'run'}"]) == 2
        assert "ranks do not share the vision tower" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub's cache has of `openai/gpt-oss-20b`."""
    snapshot = tmp_path / "models--openai--gpt-oss-20b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(GPT_OSS))
    found = partial(try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    return tmp_path


GPT_OSS = {"intermediate_size": 2880, "quantization_config": {"quant_method": "mxfp4"}}
EXAMPLE = Path(__file__).parents[3] / "configs" / "gpt_oss_20b.yaml"


def test_a_name_on_the_hub_is_looked_up_in_its_cache(cached: Path) -> None:
    assert model_faults(load(EXAMPLE)) == []
    [fault] = model_faults(load(EXAMPLE, ["bridge.name=broadcast"]))
    assert fault.startswith("bridge.name: 'broadcast' would write weights into a base of MXFP4")
    assert model_faults(load(EXAMPLE, ["bridge.name=broadcast", "model.path=nobody/has-it"])) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (["engine.tensor_parallel_size=2", "engine.devices=[0,2]"], "engine.tensor_parallel_size: 2 ranks have 1440"),
        (["engine.devices=[0]", "engine.servers=[{devices: [0, 2], tensor_parallel_size: 2}]"], "engine.servers: 2 r"),
        (["engine.extra={moe_backend: triton}"], "engine.extra.moe_backend: 'triton' has no adapters of MXFP4"),
        (["engine.num_replicas=2", "engine.devices=[0,2]"], None),
    ],
)
def test_what_vllm_cannot_adapt_of_experts_is_refused_before_it_starts(
    cached: Path, change: list[str], fault: str | None
) -> None:
    found = model_faults(load(EXAMPLE, change))
    assert [one.startswith(str(fault)) for one in found] == ([True] if fault else [])


DECODER = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"), 8),
    "model_type": "qwen2",
}
BROKEN = {
    "empty": ("", "is no JSON"),
    "torn": ('{"hidden_size": 8,', "is no JSON"),
    "bytes": ("\udcff", "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON"),
    "a list": ("[1, 2]", "holds a list, and no settings by name"),
    "null": ("null", "holds a NoneType"),
    "a text for a size": ({"num_hidden_layers": "24"}, "num_hidden_layers: '24' is no whole number above 0"),
    "a fraction": ({"hidden_size": 8.5}, "hidden_size: 8.5 is no whole number above 0"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: 0 is no whole number above 0"),
    "no type": ({"model_type": 7}, "model_type: 7 is not usable: input should be a valid string"),
    "a list of a packing": ({"quantization_config": ["gptq"]}, "quantization_config: ['gptq'] is not usable"),
    "a text of bits": (
        {"quantization_config": {"quant_method": "gptq", "bits": "4"}}, "quantization_config.bits: '4' is not usable"
    ),
    "no groups": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": 3}}},
        "quantization_config.config_groups.a: 3 is not usable: input should be a valid dictionary; mend it",
    ),
    "experts of a text": (
        {"quantization_config": {"quant_method": "mxfp4"}, "intermediate_size": "x"}, "intermediate_size: 'x'"
    ),
    "a text of layers": ({"text_config": {"num_hidden_layers": "2"}}, "text_config.num_hidden_layers: '2'"),
    "a text of a tower": ({"vision_config": "x"}, "vision_config: 'x' is not usable"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "plan"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_json_is_told_with_its_file_and_field(
    verb: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, told = BROKEN[name]
    text = content if isinstance(content, str) else json.dumps({**DECODER, **content})
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "run.yaml").write_text(TEXT)
    assert main([verb, str(tmp_path / "run.yaml"), f"model.path={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert f"model.path: {tmp_path}/config.json" in said and told in said
    assert "mend it, or fetch the model again" in said


@pytest.mark.parametrize("verb", ["check", "plan"])
@pytest.mark.parametrize("path", ["FOLDER", "FOLDER/nowhere", "a/b/c"])
def test_a_path_that_holds_no_model_is_refused(
    verb: str, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped path passed, and the engine that could not start was the first to say so."""
    (tmp_path / "run.yaml").write_text(TEXT)
    asked = path.replace("FOLDER", str(tmp_path))
    assert main([verb, str(tmp_path / "run.yaml"), f"model.path={asked}"]) == 2
    said = capsys.readouterr().err
    assert f"syncline {verb}: model.path: " in said and asked in said and "; give " in said


def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir(mode=0)
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "model" / "config.json")  # root may read all but this
    with pytest.raises(ConfigError, match=r"model\.path: .*config\.json cannot be read \(.+\); give a model's folder"):
        known_settings(str(tmp_path / "model"))
