"""Files of ms-swift load as they are; every wrong one is refused with the path of its key."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from syncline.config import RunConfig, load
from syncline.config.ms_swift import translate
from syncline.config.ms_swift_keys import SERVER_KEYS
from syncline.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden" / "ms_swift"
SERVER = "custom.extra.rollout_server"


def file(overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The golden file's values; `overrides` by dotted path, `None` takes a key away."""
    values = yaml.safe_load((GOLDEN / "server.yaml").read_text())
    del values["extends"]
    for path, value in (overrides or {}).items():
        *sections, last = path.split(".")
        here = values
        for section in sections:
            here = here.setdefault(section, {})
        here.pop(last, None) if value is None else here.__setitem__(last, value)
    return values


def loaded(tmp_path: Path, overrides: dict[str, Any] | None = None, *words: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(file(overrides)))
    return load(path, words)


def test_the_split_of_six_and_two_loads_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = load(GOLDEN / "server.yaml")
    engine = config.engine
    assert (engine.tensor_parallel_size, engine.num_replicas, engine.port) == (1, 6, 8080)
    assert (engine.devices, config.learner.devices) == ((0, 1, 2, 3, 4, 5), (6,))
    assert (engine.gpu_memory_utilization, engine.max_num_seqs, engine.enforce_eager) == (0.6, 64, False)
    assert engine.start_timeout_seconds == 240
    assert engine.extra == {
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 4},
        "mm_processor_cache_gb": 4,
        "max_num_batched_tokens": 8192,
    }
    assert config.bridge.name == "broadcast", "DoRA reaches the server merged"
    assert config.model.lora is not None
    assert (config.model.lora.rank, config.model.lora.alpha, config.model.lora.dora) == (32, 64, True)
    assert (config.model.max_length, config.sampling.max_tokens, config.sampling.temperature) == (8192, 2048, 0.7)
    run, optimizer = config.run, config.learner.optimizer
    assert (run.dir, run.seed, run.num_steps, run.groups_per_step, run.rollouts_per_group) == (
        "runs/summary", 17, 200, 8, 4
    )  # fmt: skip
    assert run.max_refills == 8
    assert config.learner.token_budget == 2 * 8192
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.num_warmup_steps) == (1e-5, 1e-6, 10)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.1, 0.5)
    assert config.learner.attention == "flash"
    [environment] = config.environments
    assert environment.task == "trl_rewards"
    assert environment.args["weights"] == [1.0, 2.0]
    told = [record.message.partition(":")[0] for record in caplog.records]
    assert {"training.logging_steps", "training.vit_lr", "deepspeed.config", "data.dataset"} <= set(told)


def test_what_was_translated_is_a_file_of_ours(tmp_path: Path) -> None:
    from syncline.launch.run_folder import config_text

    config = load(GOLDEN / "server.yaml")
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert load(tmp_path / "config.yaml") == config


def test_overrides_reach_both_sides(tmp_path: Path) -> None:
    config = loaded(tmp_path, {}, "rlhf.vllm_server_port=9000", "engine.devices=[2,3,4,5,6,7]", "learner.devices=[0]")
    assert config.engine.port == 9000
    assert config.engine.devices == (2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("port", [8080, "8080", 8080.0, [8080]])
def test_ports_as_people_write_them(tmp_path: Path, port: Any) -> None:
    assert loaded(tmp_path, {"rlhf.vllm_server_port": port}).engine.port == 8080


def test_an_adapter_that_can_be_served_is(tmp_path: Path) -> None:
    served = {"tuner.use_dora": False, f"{SERVER}.vllm_enable_lora": True, f"{SERVER}.vllm_limit_mm_per_prompt": None}
    assert loaded(tmp_path, served).bridge.name == "lora"


def test_colocated_engines_share_the_weights(tmp_path: Path) -> None:
    together = {
        "rlhf.vllm_mode": "colocate", "rlhf.vllm_gpu_memory_utilization": 0.5, "custom.extra": None,
        "rlhf.vllm_server_host": None, "rlhf.vllm_server_port": None, "rlhf.vllm_server_timeout": None,
    }  # fmt: skip
    config = loaded(tmp_path, together | {"tuner.use_dora": False})
    assert (config.bridge.name, config.engine.gpu_memory_utilization) == ("shared", 0.5)
    assert loaded(tmp_path, together).bridge.name == "restart", "DoRA must be merged"


def test_towers_that_are_not_frozen_have_rates_of_their_own(tmp_path: Path) -> None:
    config = loaded(tmp_path, {"tuner.freeze_vit": False, "tuner.freeze_aligner": False, "training.aligner_lr": 1e-6})
    assert (config.model.parts.vision, config.model.parts.aligner) == ("adapted", "adapted")
    optimizer = config.learner.optimizer
    assert (optimizer.vision_learning_rate, optimizer.aligner_learning_rate) == (1e-7, 1e-6)


def test_epochs_count_the_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 100)
    values = {"training.max_steps": None, "training.num_train_epochs": 2, "custom.train_jsonl": str(rows)}
    assert loaded(tmp_path, values).run.num_steps == 25


def test_whole_sequences_make_gspo_of_grpo(tmp_path: Path) -> None:
    sequences = {"rlhf.importance_sampling_level": "sequence"}
    assert loaded(tmp_path, sequences).learner.loss.name == "gspo"
    assert loaded(tmp_path, {"rlhf.loss_type": "grpo"} | sequences).learner.loss.name == "gspo"


@pytest.mark.parametrize(("steps", "warmup"), [(0, 20), (7, 7)])
def test_warmup_steps_go_before_a_ratio_as_in_transformers(tmp_path: Path, steps: int, warmup: int) -> None:
    values = {"training.warmup_steps": steps, "training.warmup_ratio": 0.1, "training.max_steps": 200}
    assert loaded(tmp_path, values).learner.optimizer.num_warmup_steps == warmup


def test_a_key_that_is_null_has_its_default(tmp_path: Path) -> None:
    nothing = {"rlhf": {**file()["rlhf"], "dynamic_sample": True, "max_resample_times": None}}
    assert loaded(tmp_path, nothing).run.max_refills == 3 * 8


def test_a_file_that_only_extends_others_is_theirs_too(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(file()))
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ntraining: {learning_rate: 3e-5}\n")
    assert load(tmp_path / "run.yaml").learner.optimizer.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("text", "fault"),
    [("extends: null\n", "extends: None must be a file's name"), ("extends: []\nrum: 3\n", "extends: is for files of")],
)
def test_what_extends_nothing_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        load(tmp_path / "run.yaml")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rlhf.use_vllm": False}, "rlhf.use_vllm: False, but vLLM alone samples here"),
    ({"rlhf.use_vllm": "true"}, "rlhf.use_vllm: 'true', but vLLM"),
    ({"rlhf.vllm_mode": "ray"}, "rlhf.vllm_mode: 'ray' is unknown; set it to server or colocate"),
    ({"rlhf.vllm_server_host": "10.0.0.2"}, "rlhf.vllm_server_host: ['10.0.0.2'] must be one of 127.0.0.1, localhost"),
    ({"rlhf.vllm_server_host": ["localhost", "127.0.0.1"]}, "rlhf.vllm_server_host: ['localhost', '127.0.0.1'] must"),
    ({"rlhf.vllm_server_port": True}, "rlhf.vllm_server_port: [True] must be one port of 1 to 65535"),
    ({"rlhf.vllm_server_port": 70000}, "rlhf.vllm_server_port: [70000] must be one port"),
    ({"rlhf.vllm_server_port": [8080, 8081]}, "rlhf.vllm_server_port: [8080, 8081] must be one port"),
    ({"rlhf.vllm_server_porto": 1}, "rlhf.vllm_server_porto: unknown key (value 1)"),
    ({"rlhf.vllm_max_num_seqs": 4}, f"move it to {SERVER}.vllm_max_num_seqs"),
    ({"rlhf.vllm_gpu_memory_utilization": 0.5}, "is the server's, which runs apart and would ignore it"),
    ({f"{SERVER}.vllm_colour": 1}, f"{SERVER}.vllm_colour: unknown key; the server's are vllm_tensor_parallel_size,"),
    ({f"{SERVER}.vllm_data_parallel_size": None}, f"{SERVER}.vllm_data_parallel_size: required, but missing"),
    ({f"{SERVER}.vllm_tensor_parallel_size": 0}, f"{SERVER}.vllm_tensor_parallel_size: 0 must be a whole number"),
    ({f"{SERVER}.vllm_tensor_parallel_size": 1.5}, f"{SERVER}.vllm_tensor_parallel_size: 1.5 must be a whole number"),
    ({f"{SERVER}.vllm_max_model_len": 4096}, f"{SERVER}.vllm_max_model_len: 4096 cannot hold global_max_length = 8192"),
    (
        {f"{SERVER}.vllm_max_model_len": 2048, "global_max_length": None},
        f"{SERVER}.vllm_max_model_len: 2048 leaves no room for a prompt beside rlhf.max_completion_length = 2048",
    ),
    ({f"{SERVER}.vllm_gpu_memory_utilization": 0}, f"{SERVER}.vllm_gpu_memory_utilization: 0 must be above 0"),
    ({f"{SERVER}.vllm_gpu_memory_utilization": 1.01}, f"{SERVER}.vllm_gpu_memory_utilization: 1.01 must be above 0"),
    (
        {f"{SERVER}.vllm_enable_lora": True},
        f"{SERVER}.vllm_enable_lora: true, but vLLM serves no DoRA (tuner.use_dora)",
    ),
    (
        {f"{SERVER}.vllm_enable_lora": True, "tuner.use_dora": False},
        f"{SERVER}.vllm_enable_lora: true, but adapters of multimodal towers are not served",
    ),
    ({f"{SERVER}.vllm_enable_lora": True, "tuner.train_type": "full"}, f"{SERVER}.vllm_enable_lora: true, and tuner."),
    ({f"{SERVER}.vllm_max_lora_rank": 32}, f"{SERVER}.vllm_max_lora_rank: 32 is set from tuner.lora_rank"),
    ({f"{SERVER}.vllm_quantization": 8}, f"{SERVER}.vllm_quantization: 8 must be the name of a method"),
    ({f"{SERVER}.vllm_use_async_engine": False}, f"{SERVER}.vllm_use_async_engine: false"),
    ({f"{SERVER}.vllm_engine_kwargs": "{"}, f"{SERVER}.vllm_engine_kwargs: '{{' is not JSON"),
    (
        {f"{SERVER}.vllm_engine_kwargs": {"max_model_len": 9}},
        f"{SERVER}.vllm_engine_kwargs.max_model_len: is said twice",
    ),
    ({"rlhf.generation_batch_size": 30}, "rlhf.generation_batch_size: 30 is no multiple of rlhf.num_generations = 4"),
    ({"rlhf.generation_batch_size": 64}, "rlhf.generation_batch_size: 64 is not training.effective_batch_size = 32"),
    ({"rlhf.repetition_penalty": 1.05}, "rlhf.repetition_penalty: 1.05 changes the distribution"),
    ({"rlhf.advantage_estimator": "rloo"}, "rlhf.advantage_estimator: 'rloo' is no estimator of this learner"),
    ({"rlhf.loss_type": "sapo"}, "rlhf.loss_type: 'sapo' has no counterpart here; use one of grpo,"),
    ({"rlhf.kl_in_reward": True}, "rlhf.kl_in_reward: true, but KL is a term of the loss"),
    ({"rlhf.reward_funcs": ["summary.format", "a:b"]}, "rlhf.reward_funcs.0: 'summary.format' is no import path"),
    ({"rlhf.reward_weights": [1.0]}, "rlhf.reward_weights: 1 numbers for 2 rlhf.reward_funcs"),
    ({"rlhf.reward_weights": 2}, "rlhf.reward_weights: 1 numbers for 2 rlhf.reward_funcs"),
    (
        {"rlhf.loss_type": "dr_grpo", "rlhf.importance_sampling_level": "sequence"},
        "rlhf.importance_sampling_level: 'sequence' is 'gspo' here, and rlhf.loss_type says 'dr_grpo'; leave one out",
    ),
    ({"rlhf.num_generations": 0}, "rlhf.num_generations (run.rollouts_per_group): 0 is not usable"),
    ({"rlhf.num_generations": []}, "rlhf.num_generations: [] must be a number"),
    ({"rlhf.max_completion_length": "long"}, "rlhf.max_completion_length: 'long' must be a number"),
    ({"global_max_length": "x"}, "global_max_length: 'x' must be a number"),
    ({"training.warmup_ratio": float("nan")}, "training.warmup_ratio: nan must be a number"),
    ({"training.lr_scheduler_kwargs": 3}, "training.lr_scheduler_kwargs: 3 has keys other than min_lr"),
    ({"model.attn_impl": []}, "model.attn_impl (learner.attention): [] is not usable"),
    ({"custom.grpo.chord.enabled": True}, "custom.grpo.chord.enabled: True mixes fine-tuning into the loss"),
    ({"custom.colour": 1}, "custom.colour: unknown key (value 1)"),
    ({"model.model": None}, "model.model: required, but missing"),
]


@pytest.mark.parametrize(("overrides", "fault"), WRONG, ids=[fault[:60] for _, fault in WRONG])
def test_a_wrong_combination_is_refused_with_the_path_of_its_key(
    tmp_path: Path, overrides: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, overrides)
    assert [told for told in refused.value.faults if fault in told], refused.value.faults


def test_other_gpus_than_ranks_are_refused_with_both_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, {}, "engine.devices=[0,1,2,3]", "engine.device=cuda", "learner.device=cuda")
    assert refused.value.faults[0].startswith(
        f"{SERVER}.vllm_tensor_parallel_size × vllm_data_parallel_size (engine.devices): [0, 1, 2, 3] names 4 GPUs"
    )


def test_a_fault_found_in_our_schema_names_their_path_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rlhf\.top_p \(sampling\.top_p\): 0\.9 cuts the distribution"):
        loaded(tmp_path, {"rlhf.top_p": 0.9})


def test_every_key_of_the_server_is_known() -> None:
    values = dict.fromkeys(SERVER_KEYS, 1) | {"vllm_gpu_memory_utilization": 0.5, "vllm_quantization": "fp8"}
    values |= {"vllm_enable_lora": False, "vllm_max_lora_rank": None, "vllm_use_async_engine": True}
    values |= {"vllm_engine_kwargs": {}, "vllm_max_model_len": 8192}
    found = translate(file({f"{SERVER}.{name}": value for name, value in values.items() if value is not None}))
    assert not [fault for fault in found.faults if "unknown" in fault]


def test_files_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}.yaml\nrlhf: {{x: 1}}\n")
    with pytest.raises(ConfigError, match="extends: comes back to itself"):
        load(tmp_path / "a.yaml")
