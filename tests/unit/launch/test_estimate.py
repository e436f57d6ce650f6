"""Estimates against what was measured on an H200 (docs/log.md), within a tenth; and splits that follow from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from syncline.bench.shapes import SHAPES, VOCABULARY
from syncline.config import RunConfig, resolve
from syncline.errors import ConfigError
from syncline.launch.estimate import (
    activation_parts,
    engine_memory,
    learn_seconds,
    learner_parts,
    sample_seconds,
    share_of_rate,
    total,
)
from syncline.launch.shape import Shape, read_shape, shape_of
from syncline.launch.split import fastest_recomputation, splits

TOLERANCE = 0.1


def shape(name: str) -> Shape:
    sizes = SHAPES[name]
    text = {**sizes, "vocab_size": VOCABULARY, "model_type": "qwen2"}
    return shape_of(text, tied=sizes["tie_word_embeddings"])


def config(**sections: Any) -> RunConfig:
    base = {
        "run": {"dir": "runs/x", "num_steps": 4, "groups_per_step": 16, "rollouts_per_group": 8},
        "model": {"path": "m", "max_length": 512} | sections.pop("model", {}),
        "sampling": {"max_tokens": 256},
        "environments": [{"task": "arithmetic"}],
    }
    return resolve(base | sections)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)],
)
def test_parameters_are_counted_exactly(name: str, parameters: int) -> None:
    padding = {"qwen2.5-7b": (152064 - VOCABULARY) * 3584 * 2}.get(name, 0)
    assert shape(name).parameters + padding == parameters


FULL_7B = {
    "token_budget": 8192, "gradients": "bfloat16", "optimizer": {"moments": "int8"}, "recomputation": {"what": "full"},
}  # fmt: skip


def test_a_7b_with_every_parameter_trained_in_80_gb() -> None:
    parts = {p.name: p.num_bytes / 1e9 for p in learner_parts(config(learner=FULL_7B), shape("qwen2.5-7b"))}
    assert parts["weights"] == pytest.approx(15.3, rel=0.02)
    assert parts["optimizer"] == pytest.approx(30.8, rel=0.02)
    assert parts["gradients"] == pytest.approx(15.3, rel=0.02)
    assert parts["activations"] + parts["logits"] + parts["head's gradient"] == pytest.approx(5.2, rel=0.12)
    assert sum(parts.values()) == pytest.approx(68.1, rel=0.02)


def test_a_32b_adapter_in_80_gb() -> None:
    learner = {"token_budget": 4096, "recomputation": {"what": "full"}}
    parts = learner_parts(config(learner=learner, model={"lora": {"rank": 32}}), shape("qwen2.5-32b"))
    found = {part.name: part.num_bytes / 1e9 for part in parts}
    assert found["weights"] + found["adapter"] == pytest.approx(66.7, rel=0.02)
    assert (found["optimizer"], found["gradients"]) == pytest.approx((2.1, 1.1), rel=0.05)
    assert total(parts) / 1e9 == pytest.approx(76.4, rel=0.02)


@pytest.mark.parametrize(("what", "measured"), [("none", 46.2), ("full", 4.2)])
def test_activations_of_a_7b(what: str, measured: float) -> None:
    learner = {"token_budget": 10240, "recomputation": {"what": what}}
    kept = activation_parts(config(learner=learner), shape("qwen2.5-7b"))
    assert total(kept) / 1e9 == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "again", "measured"), [
    ("qwen2.5-1.5b", False, 55.6e3), ("qwen2.5-1.5b", True, 42.7e3),
    ("qwen2.5-7b", False, 13.9e3), ("qwen2.5-7b", True, 10.7e3),
])  # fmt: skip
def test_learning_takes_as_long_as_it_did(name: str, again: bool, measured: float) -> None:
    learner = {"recomputation": {"what": "full" if again else "none"}}
    seconds = learn_seconds(config(learner=learner), shape(name), rate=795e12, num_gpus=1)
    assert 16 * 8 * 512 / seconds == pytest.approx(measured, rel=TOLERANCE)


def test_sampling_takes_as_long_as_it_did() -> None:
    """0.94 s for 128 attempts of 256 tokens of a 0.5B model."""
    half = shape("qwen2.5-0.5b")
    engine = engine_memory(config(), half, gpu_bytes=141e9, num_ranks=1, utilisation=0.9)
    seconds = sample_seconds(config(), half, engine, bandwidth=4.8e12, num_ranks=1, num_engines=1)
    assert seconds == pytest.approx(0.94, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "waited", "learned"), [("qwen2.5-0.5b", 2.84, 1.53), ("qwen2.5-1.5b", 3.55, 3.13)])
def test_a_step_of_long_completions_takes_as_long_as_it_did(name: str, waited: float, learned: float) -> None:
    """256 attempts of 512 tokens after 128, one engine. The smaller learner's own time is short beside what a step has
    of fixed costs, which are not estimated."""
    run = config(
        run={"dir": "x", "num_steps": 4, "groups_per_step": 32, "rollouts_per_group": 8},
        model={"max_length": 640}, sampling={"max_tokens": 512},
    )  # fmt: skip
    model = shape(name)
    engine = engine_memory(run, model, gpu_bytes=141e9, num_ranks=1, utilisation=0.9)
    sampled = sample_seconds(run, model, engine, bandwidth=4.8e12, num_ranks=1, num_engines=1)
    assert sampled == pytest.approx(waited, rel=TOLERANCE)
    assert learn_seconds(run, model, rate=795e12, num_gpus=1) == pytest.approx(learned, rel=2 * TOLERANCE)


def test_two_engines_of_one_gpu_take_as_long_as_they_did() -> None:
    """2.50 s: each has half of the memory's rate; that they share the host too is not estimated."""
    run = config(
        run={"dir": "x", "num_steps": 4, "groups_per_step": 32, "rollouts_per_group": 8},
        model={"max_length": 640}, sampling={"max_tokens": 512},
    )  # fmt: skip
    half = shape("qwen2.5-0.5b")
    engine = engine_memory(run, half, gpu_bytes=141e9, num_ranks=1, utilisation=0.4)
    seconds = sample_seconds(run, half, engine, bandwidth=2.4e12, num_ranks=1, num_engines=2)
    assert seconds == pytest.approx(2.50, rel=2 * TOLERANCE)


GPT_OSS = {
    "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "head_dim": 64,
    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
    "tie_word_embeddings": False, "attention_bias": True, "sliding_window": 128, "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"] * 12, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
ADAPTED = {"lora": {"rank": 4}, "dtype": "bfloat16", "max_length": 6144}


def written(folder: Path, values: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_gpt_oss_takes_what_docs_gpt_oss_says_of_it(tmp_path: Path) -> None:
    found = read_shape(written(tmp_path, GPT_OSS))
    assert found.parameters == pytest.approx(20_914_757_184, rel=1e-3)
    assert found.engine_bytes / 1e9 == pytest.approx(11.07 + 3.61, rel=0.01)
    assert 16 * found.cache_bytes(6144) / 1e9 == pytest.approx(2.42, rel=0.03)
    run = config(model=ADAPTED | {"path": str(tmp_path)}, sampling={"max_tokens": 5000}, learner=FULL_7B)
    parts = engine_memory(run, found, gpu_bytes=80e9, num_ranks=1, utilisation=0.85).parts
    assert {part.name: part.num_bytes for part in parts}["weights"] == found.engine_bytes


def test_splits_that_the_engine_or_the_learner_refuses_are_not_proposed(tmp_path: Path) -> None:
    learner = {"recomputation": {"what": "full"}}
    model = ADAPTED | {"path": written(tmp_path, GPT_OSS)}
    run = config(model=model, sampling={"max_tokens": 5000}, learner=learner, bridge={"name": "lora"})
    found = splits(run, read_shape(str(tmp_path)), num_gpus=4, gpu="h200")
    assert {(split.tensor_parallel, split.num_engines, split.learner_gpus) for split in found} == {(1, 3, 1)}

    seven = {**SHAPES["qwen2.5-7b"], "vocab_size": VOCABULARY}
    path = written(tmp_path, {"model_type": "qwen2_5_vl", "text_config": seven, "vision_config": {"depth": 32}})
    run = config(model={"path": path}, learner=FULL_7B)
    found = splits(run, read_shape(path), num_gpus=4, gpu="h200")
    assert {split.learner_gpus for split in found} == {1}
    written(tmp_path, {"model_type": "qwen2_5", "text_config": seven})
    assert {split.learner_gpus for split in splits(run, read_shape(path), num_gpus=4, gpu="h200")} > {1, 2}


@pytest.mark.parametrize(("packing", "share"), [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, (1 / 2 + 2 / 128) / 2),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}}, 1 / 2),
])  # fmt: skip
def test_a_packed_base_takes_as_many_bits_as_it_says(packing: dict[str, Any], share: float) -> None:
    seven = SHAPES["qwen2.5-7b"] | {"vocab_size": VOCABULARY, "model_type": "qwen2"}
    found = shape_of(seven, tied=False, packing=packing)
    embeddings = 2 * found.hidden * found.vocabulary
    layers = found.parameters - embeddings
    assert found.engine_bytes == pytest.approx(2 * embeddings + 2 * layers * share, rel=1e-3)


def test_between_measured_sizes_the_rate_lies_between() -> None:
    assert share_of_rate(1e8) == 0.49 < share_of_rate(1e9) < share_of_rate(3e9) < share_of_rate(1e11) == 0.73


def test_the_proposed_split_fits_and_is_the_fastest_of_those() -> None:
    learner = FULL_7B | {"token_budget": 16384}
    run = config(learner=learner, model={"max_length": 4096}, sampling={"max_tokens": 2048})
    found = splits(run, shape("qwen2.5-7b"), num_gpus=8, gpu="h200")
    assert found == sorted(found, key=lambda split: split.step)
    assert all(total(split.learner) < 141e9 for split in found)
    assert {split.bridge for split in found} == {"broadcast"}, "8-bit moments are not split by layers"
    for split in found:
        engines, told = split.num_engines * split.engine_ranks, split.overrides()
        assert engines + split.learner_gpus <= 8
        assert not set(told["engine.devices"]) & set(told["learner.devices"])


def test_stages_of_a_pipeline_take_gpus_and_hold_a_part_each_but_read_in_turn() -> None:
    learner = FULL_7B | {"token_budget": 16384}

    def proposed(stages: int) -> dict[tuple[int, int], Any]:
        engine = {"devices": list(range(stages)), "extra": {"pipeline_parallel_size": stages}}
        run = config(learner=learner, engine=engine)
        found = splits(run, shape("qwen2.5-7b"), num_gpus=8, gpu="h200")
        assert all(split.num_engines * split.engine_ranks + split.learner_gpus <= 8 for split in found)
        return {(split.tensor_parallel, split.num_engines): split for split in found}

    one, two = proposed(1)[2, 1], proposed(2)[2, 1]
    assert two.overrides()["engine.devices"] == [0, 1, 2, 3]
    assert two.overrides()["engine.tensor_parallel_size"] == 2
    assert two.engine.parts[0].num_bytes == one.engine.parts[0].num_bytes / 2
    assert two.sample == one.sample


def test_what_does_not_fit_is_not_proposed() -> None:
    assert splits(config(), shape("qwen2.5-32b"), num_gpus=1, gpu="a100") == []
    whole = splits(config(), shape("qwen2.5-7b"), num_gpus=2, gpu="a100")
    assert whole == [], "16 bytes a parameter are 122 GB"


def test_what_is_kept_grows_from_input_to_everything() -> None:
    """Of the 1.5B's layers, in bytes a token: see `docs/learner.md`."""
    found = {}
    for what in ("full", "attention", "selective", "none"):
        learner = {"token_budget": 512, "recomputation": {"what": what}}
        parts = activation_parts(config(learner=learner), shape("qwen2.5-1.5b"))
        found[what] = next(part.num_bytes for part in parts if part.name == "activations") / 512
    whole = found["none"] / 28
    assert [(found[what] - whole) / 28 for what in ("full", "attention")] == [2 * 1536, 2 * 2 * 1536]
    assert (found["selective"] - whole) / 28 == 2 * (4 * 1536 + 512 + 2 * 8960)
    assert (found["selective"] - whole) / found["none"] == pytest.approx(0.67, abs=0.01)


def test_no_more_is_computed_again_than_memory_asks_for() -> None:
    learner = {"token_budget": 16384, "gradients": "bfloat16", "optimizer": {"moments": "int8"}}
    sizes: dict[str, Any] = {"model": {"max_length": 4096}, "sampling": {"max_tokens": 2048}}
    wasteful = config(learner=learner | {"recomputation": {"what": "full"}}, **sizes)
    h200 = fastest_recomputation(wasteful, shape("qwen2.5-7b"), num_gpus=8, gpu="h200")
    assert h200 is not None
    assert h200[0] == "none"
    assert h200[1].step < splits(wasteful, shape("qwen2.5-7b"), num_gpus=8, gpu="h200")[0].step
    a100 = fastest_recomputation(config(learner=learner, **sizes), shape("qwen2.5-7b"), num_gpus=2, gpu="a100")
    assert a100 is not None
    assert a100[0] == "attention"
    assert fastest_recomputation(config(), shape("qwen2.5-32b"), num_gpus=1, gpu="a100") is None


def test_a_model_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match=r"config\.json without num_hidden_layers, num_attention_heads"):
        read_shape(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shape(str(tmp_path / ".."))


EIGHT_BITS = {"token_budget": 512, "optimizer": {"moments": "int8"}}


@pytest.mark.parametrize(("name", "blocks_of"), [("qwen2.5-0.5b", 128), ("qwen2.5-7b", 256)])
def test_eight_bit_moments_cost_what_the_blocks_of_their_rows_do(name: str, blocks_of: int) -> None:
    """Rows of 896 have blocks of 128, but rows of 4864 of 256; norms and biases are in float32."""
    own = shape(name)
    parts = learner_parts(config(learner=EIGHT_BITS), own)
    held = next(part.num_bytes for part in parts if part.name == "optimizer") / own.parameters - 2
    assert held == pytest.approx(2 * (1 + 4 / blocks_of), abs=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_every_matrix_are_counted(name: str) -> None:
    own = shape(name)
    vectors = own.layers * (own.query + own.key_value + 2 * own.hidden) + own.hidden
    assert sum(own.rows(None).values()) + vectors == own.parameters
    assert sum(own.rows(8).values()) == own.adapter(8)
    whole = learner_parts(config(learner=EIGHT_BITS, model={"lora": {"rank": 8}}), own)
    held = next(part.num_bytes for part in whole if part.name == "optimizer") / own.adapter(8)
    assert held > 4.5, "rows of 8, half of the adapter, fill no block"
