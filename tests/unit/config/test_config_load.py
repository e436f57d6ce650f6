"""YAML, overrides and messages."""

from pathlib import Path

import pytest

from syncline.config import load, resolve
from syncline.errors import ConfigError

TEXT = """
run: {dir: runs/x, num_steps: 10, groups_per_step: 4}
model: {path: some/model, max_length: 128}
sampling: {max_tokens: 16}
environments: [{task: arithmetic}]
learner: {token_budget: 512}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_overrides_set_fields_of_any_depth_and_type(file: Path) -> None:
    config = load(
        file,
        [
            "run.seed=7",
            "learner.optimizer.learning_rate=1e-3",
            "environments.0.args={seed: 3}",
            "model.lora.rank=8",
            "engine.extra.max_num_batched_tokens=512",
            "learner.loss.name=dr_grpo",
        ],
    )
    assert config.run.seed == 7
    assert config.learner.optimizer.learning_rate == 1e-3
    assert config.environments[0].args == {"seed": 3}
    assert config.model.lora is not None
    assert config.model.lora.rank == 8
    assert config.engine.extra == {"max_num_batched_tokens": 512}
    assert config.learner.loss.name == "dr_grpo"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", r"write it as section\.field=value"),
        ("run.sed=3", r"run\.sed: unknown key \(value 3\); did you mean 'seed'\?"),
        ("run.seed.deep=3", r"(?s)run\.seed"),
        ("environments.4.task=x", r"'4' is not a section"),
        ("run.seed={", r"is not a YAML value"),
        ("run.dir=2024-13-45", r"is not a YAML value"),
        ("run.seed=0x_", r"is not a YAML value"),
        ("environments.².name=a", r"'²' is not a section"),
        ("learner.compile=off", r"should be 'auto', 'on' or 'off', in quotes: YAML takes a bare on, off"),
    ],
)
def test_a_bad_override_is_refused_with_the_remedy(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(file, [override])


def test_a_key_written_twice_is_refused(file: Path) -> None:
    file.write_text(TEXT + "run: {dir: y}\n")
    with pytest.raises(ConfigError, match="key 'run' is written twice"):
        load(file)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"a: caf\xe9\n", "invalid continuation byte"),
        (b"a: {{ name }}\n", "found unhashable key"),
        (b"a: 2024-13-45\n", "month must be in 1..12"),
        (b"a: " + b"[" * 3_000, "recursion"),
    ],
    ids=["latin-1", "a template's braces", "no date", "deep"],
)
def test_a_file_that_is_no_yaml_is_refused_by_its_path(file: Path, text: bytes, fault: str) -> None:
    file.write_bytes(TEXT.encode() + text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: not valid YAML: (?s:.*){fault}"):
        load(file)


def test_mappings_are_merged_as_yaml_merges_them(file: Path) -> None:
    tasks = "[{task: a, args: {deep: &b {<<: &a {x: 1, y: 1}, x: 2}}}, {task: b, args: {<<: *b, y: 3}}]"
    file.write_text(TEXT.replace("[{task: arithmetic}]", tasks))
    first, second = load(file).environments
    assert (first.args, second.args) == ({"deep": {"x": 2, "y": 1}}, {"x": 2, "y": 3})


def test_faults_of_several_fields_come_together(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, ["run.num_steps=0", "sampling.temperature=-1", "model.dtpye=float32"])
    assert len(caught.value.faults) == 3


def test_faults_between_sections_come_together(file: Path) -> None:
    overrides = ["sampling.max_tokens=128", "sampling.top_p=0.9", "learner.token_budget=64"]
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "sampling.max_tokens",
        "learner.token_budget",
        "sampling.top_p",
    ]


def test_one_copy_is_refused_on_another_device_or_with_repacked_weights(file: Path) -> None:
    overrides = ["bridge.name=shared", "learner.devices=[1]", "engine.extra.quantization=fp8"]
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["learner.devices", "engine.extra.quantization"]


@pytest.mark.parametrize("bridge", ["lora", "shared"])
def test_an_adapter_is_refused_where_the_engine_cannot_serve_or_prove_it(file: Path, bridge: str) -> None:
    overrides = [
        f"bridge.name={bridge}",
        "bridge.in_flight=keep",
        "model.lora={rank: 1000, target_modules: [q_proj, lm_head]}",
        "engine.extra={max_loras: 1, enable_lora: false}",
    ]
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "model.lora.rank",
        "model.lora.target_modules",
        "bridge.in_flight",
        "engine.extra.enable_lora",
        "engine.extra.max_loras",
    ]


def test_merged_adapters_know_none_of_that(file: Path) -> None:
    config = load(file, ["bridge.name=restart", "model.lora={rank: 1000, target_modules: [q_proj, lm_head]}"])
    assert config.model.lora is not None


def test_a_config_is_frozen(file: Path) -> None:
    config = load(file)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="model: required, but missing"):
        resolve({"run": {"dir": "x", "num_steps": 1, "groups_per_step": 1}})
