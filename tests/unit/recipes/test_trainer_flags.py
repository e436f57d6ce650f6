"""Every flag of Atropos' example trainer: what of the configuration it sets, or what it is refused with."""

import argparse
from typing import Any

import pytest
from recipe_files import load_recipe

from syncline.config import RunConfig, resolve
from syncline.errors import ConfigError

SHARED, LORA, OWN = ("--weight-bridge-mode shared_vllm", "--weight-bridge-mode lora_only", "")
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "--model-name": ("--model-name other", {"model.path": "other"}),
    "--model": ("--model other", {"model.path": "other"}),
    "--lr": ("--lr 3e-4", {"learner.optimizer.learning_rate": 3e-4, "learner.optimizer.schedule": "constant"}),
    "--training-steps": ("--training-steps 7", {"run.num_steps": 7}),
    "--batch-size": ("--batch-size 4", {"run.groups_per_step": 16, "learner.token_budget": 8192}),
    "--gradient-accumulation-steps": ("--gradient-accumulation-steps 8", {"run.groups_per_step": 2}),
    "--seq-len": ("--seq-len 512", {"model.max_length": 512, "sampling.max_tokens": 511}),
    "--warmup-steps": ("--warmup-steps 3", {"learner.optimizer.num_warmup_steps": 3}),
    "--optimizer": ("--optimizer adamw_8bit", {"learner.optimizer.moments": "int8"}),
    "--clip-eps": ("--clip-eps 0.1", {"learner.loss.clip_low": 0.1, "learner.loss.clip_high": 0.1}),
    "--kl-coef": ("--kl-coef 0.04", {"learner.loss.kl_coef": 0.04}),
    "--device": ("--device cuda:1", {"learner.devices": (1,), "engine.device": "cuda"}),
    "--dtype": ("--dtype float32", {"model.dtype": "float32"}),
    "--save-path": ("--save-path there", {"run.dir": "there"}),
    "--checkpoint-interval": (f"{SHARED} --checkpoint-interval 4", {"learner.checkpoint_interval": 4}),
    "--atropos-url": (
        "--atropos-url http://localhost:8100",
        {"trajectory.host": "127.0.0.1", "trajectory.port": 8100},
    ),
    "--weight-bridge-mode": (
        "--weight-bridge-mode lora_restart",
        {"bridge.name": "restart", "bridge.restart": "process", "model.lora.rank": 16},
    ),
    "--single-copy": (f"{SHARED} --single-copy", {"bridge.name": "shared", "bridge.interval": 1}),
    "--vllm-config-path": (f"{SHARED} --vllm-config-path there", {}),
    "--vllm-port": ("--vllm-port 9100", {"engine.port": 9100}),
    "--vllm-gpu": ("--vllm-gpu 1", {"engine.devices": (1,), "learner.devices": (0,)}),
    "--gpu-memory-utilization": ("--gpu-memory-utilization 0.3", {"engine.gpu_memory_utilization": 0.3}),
    "--vllm-gpu-memory-utilization": ("--vllm-gpu-memory-utilization 0.3", {"engine.gpu_memory_utilization": 0.3}),
    "--vllm-restart-interval": (
        "--vllm-restart-interval 5",
        {"bridge.interval": 5, "learner.checkpoint_interval": 5, "parity.interval": 20},
    ),
    "--lora-r": (f"{LORA} --lora-r 8", {"model.lora.rank": 8, "bridge.name": "lora"}),
    "--lora-alpha": (f"{LORA} --lora-alpha 8", {"model.lora.alpha": 8}),
    "--lora-dropout": (f"{LORA} --lora-dropout 0.05", {"model.lora.dropout": 0.05}),
    "--lora-target-modules": (f"{LORA} --lora-target-modules k_proj", {"model.lora.target_modules": ("k_proj",)}),
    "--lora-layer-indices": (
        f"{LORA} --lora-layer-indices 0-1,3",
        {"model.lora.target_modules": r".*\.(0|1|3)\..*\b(q_proj|v_proj)"},
    ),
    "--log-dir": ("--log-dir there", {}),
    "--debug-loading": ("--debug-loading", {}),
    "--benchmark": ("--benchmark", {}),
    "--use-wandb": ("--use-wandb", {"observe.sinks": ("wandb",), "observe.project": "syncline"}),
    "--wandb-project": ("--use-wandb --wandb-project mine", {"observe.project": "mine"}),
    "--wandb-group": ("--use-wandb --wandb-group mine", {"observe.group": "mine"}),
    "--group-size": ("--group-size 16", {"run.rollouts_per_group": 16, "run.groups_per_step": 4}),
    "--max-staleness": ("--max-staleness 0", {"run.max_staleness": 0}),
}
"""Flag → a command line with it, and what it sets. Those that set nothing are the program's own."""
REFUSED = {
    "--train-layer-indices": "--train-layer-indices 20-31",
    "--adafactor-scale-parameter": "--adafactor-scale-parameter",
    "--adafactor-relative-step": "--adafactor-relative-step",
    "--max-model-len": "--max-model-len 4096",
    "--trainer-rank": "--trainer-rank 1",
    "--world-size": "--world-size 2",
    "--init-method": "--init-method tcp://host:1",
    "--num-inference-nodes": "--num-inference-nodes 1",
    "--distill-enabled": "--distill-enabled",
    "--distill-coef": "--distill-coef 0.5",
    "--distill-temperature": "--distill-temperature 2",
}
REFUSED_HERE = {
    "--optimizer adafactor": "use adamw_8bit",
    "--dtype float16": "use bfloat16",
    "--wandb-project mine": "is for --use-wandb",
    "--wandb-group mine": "is for --use-wandb",
    "--group-size 7": "--gradient-accumulation-steps = 64 sequences",
    f"{SHARED} --vllm-gpu 1": "give it to vllm_api_server.py",
    f"{SHARED} --gpu-memory-utilization 0.3": "give it to vllm_api_server.py",
    f"{LORA} --single-copy": "is for --weight-bridge-mode shared_vllm",
    "--vllm-config-path there": "is for --weight-bridge-mode shared_vllm",
    "--lora-layer-indices 1": "use --weight-bridge-mode lora_only",
    f"{LORA} --lora-layer-indices 1-x": "write 0-3,28-31",
    "--atropos-url https://host": "is no http://host:port",
    "--atropos-url http://host:port": "is no http://host:port",
    "--device cuda:x": "write cuda, cuda:N or cpu",
    "--vllm-restart-interval 0": "give 1 or more",
    "--batch-size 0": "--gradient-accumulation-steps = 0 sequences",
}


@pytest.fixture
def flags(monkeypatch):
    return load_recipe("atropos/example_trainer/trainer_flags.py", monkeypatch)


def config_of(flags, line: str) -> RunConfig:
    words = line.split()
    named = words if "--model" in line.replace("--model-name", "--model").split() else ["--model-name", "m", *words]
    return resolve(flags.run_values(flags.parser().parse_args(named)))


def value(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


def test_every_flag_is_in_one_of_the_tables(flags):
    known = {option for action in flags.parser()._actions for option in action.option_strings}
    assert known - {"-h", "--help"} == set(SETS) | set(REFUSED)


@pytest.mark.parametrize("flag", SETS)
def test_a_flag_sets_what_it_says(flags, flag):
    line, expected = SETS[flag]
    assert flag in line.split()
    config = config_of(flags, line)
    assert {field: value(config, field) for field in expected} == expected


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_would_do_nothing_is_refused_by_name(flags, flag):
    with pytest.raises(ConfigError) as refusal:
        config_of(flags, REFUSED[flag])
    assert str(refusal.value).startswith(f"{flag} ")
    assert len(flags.ALWAYS_REFUSED) == len(REFUSED)


@pytest.mark.parametrize("line", REFUSED_HERE)
def test_a_flag_is_refused_where_it_would_do_nothing(flags, line):
    with pytest.raises(ConfigError) as refusal:
        config_of(flags, line)
    assert REFUSED_HERE[line] in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--training-steps -1", "--training-steps: -1 is not usable"),
        ("--lr 0", "--lr: 0.0 is not usable"),
        ("--gpu-memory-utilization 7", "--gpu-memory-utilization: 7.0 is not usable"),
        ("--vllm-restart-interval 10 --checkpoint-interval 4", "publishes, which are every --vllm-restart-interval"),
    ],
)
def test_what_the_configuration_refuses_is_told_by_flag(flags, line, told):
    with pytest.raises(ConfigError) as refusal:
        config_of(flags, line)
    assert told in str(refusal.value.renamed(flags.FLAGS))
    known = {option for action in flags.parser()._actions for option in action.option_strings}
    assert {word for names in flags.FLAGS.values() for word in names.split() if word.startswith("--")} - known == {
        "--weight-bridge-mode,",
        "--lora-*",
    }


def test_without_flags_it_trains_as_the_original_did(flags):
    config = config_of(flags, "")
    assert (config.run.groups_per_step * config.run.rollouts_per_group, config.run.num_steps) == (64, 10)
    assert (config.bridge.name, config.bridge.restart, config.bridge.interval) == ("restart", "process", 3)
    assert config.learner.optimizer.betas == (0.9, 0.999)
    assert (config.learner.loss.old_logprobs, config.learner.loss.importance.level) == ("sampler", "none")
    assert config.learner.checkpoint_name.format(step=3) == "step_3"
    assert config.environments == ()


def test_the_adapters_checkpoints_are_named_as_such(flags):
    config = config_of(flags, LORA)
    assert config.learner.checkpoint_name.format(step=3) == "adapter_step_3"


def test_what_asks_for_nothing_is_not_refused(flags):
    line = "--trainer-rank 0 --world-size 1 --init-method env:// --num-inference-nodes 0"
    assert isinstance(flags.parser().parse_args(["--model", "m", *line.split()]), argparse.Namespace)
    assert config_of(flags, line).run.num_steps == 10
