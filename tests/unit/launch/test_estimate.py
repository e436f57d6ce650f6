"""Estimates against what was measured on an H200 (docs/log.md), within a tenth; and splits that follow from them."""

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
    with pytest.raises(ConfigError, match="has no readable config"):
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
