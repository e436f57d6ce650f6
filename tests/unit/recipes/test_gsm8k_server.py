"""The GSM8K environment under Atropos' options: which verb of ours each command is, and with what."""

import pytest
from recipe_files import load_recipe

from syncline.config import resolve
from syncline.errors import ConfigError

DOCUMENTED = (
    "serve --slurm False --openai.model_name m --openai.base_url http://localhost:9001/v1 --openai.server_type vllm "
    "--openai.api_key x --env.tokenizer_name t --env.use_wandb False"
)


@pytest.fixture
def server(monkeypatch):
    return load_recipe("atropos/environments/gsm8k_server.py", monkeypatch)


def options(server, line: str):
    return vars(server.parser().parse_args(line.split()))


def test_serve_asks_the_trajectory_server_for_permits(server):
    asked = options(server, DOCUMENTED + " --env.group_size 16 --env.max_token_length 512 --env.max_num_workers 4")
    config = resolve(server.run_values(asked))
    assert (config.model.path, config.model.tokenizer, config.run.rollouts_per_group) == ("m", "t", 16)
    assert (config.model.max_length, config.environments[0].concurrency) == (512, 4)
    assert server.command(asked, "FILE") == [
        "env", "FILE", "--engine-url", "http://localhost:9001", "--trajectories-url", "http://localhost:8000",
        "--patience-seconds", "86400",
    ]  # fmt: skip


def test_process_and_evaluate_write_where_they_were_told(server):
    line = "process --openai.model_name m --env.total_steps 3 --env.data_path_to_save_groups a/b.jsonl"
    assert server.command(options(server, line), "FILE")[-4:] == ["--num-groups", "3", "--out", "a/b.jsonl"]
    asked = options(server, "evaluate --openai.model_name m --env.data_dir_to_save_evals there --num-tasks 5")
    assert server.command(asked, "FILE")[-2:] == ["--out", "there/metrics.json"]
    assert resolve(server.run_values(asked)).evaluation.num_tasks == 5


@pytest.mark.parametrize(
    "option",
    [
        "--env.use_wandb True", "--slurm true", "--testing true", "--env.batch_size 4",
        "--env.max_batches_offpolicy 2", "--env.inference_weight 0.5", "--env.min_batch_allocation 0.1",
        "--env.steps_per_eval 10", "--config file.yaml",
        "--openai.base_url localhost:9001/v1", "--env.rollout_server_url http://localhost:port",
    ],
)  # fmt: skip
def test_what_another_part_decides_is_refused_by_name(server, option):
    with pytest.raises(ConfigError) as refusal:
        server.run_values(options(server, f"serve --openai.model_name m {option}"))
    assert str(refusal.value).startswith(option.split()[0])


def test_groups_are_at_least_one(server):
    with pytest.raises(ConfigError, match=r"--env\.total_steps -1: makes no group"):
        server.run_values(options(server, "process --openai.model_name m --env.total_steps -1"))


@pytest.mark.parametrize("option", ["--env.group_size 0", "--env.max_token_length 1", "--env.max_num_workers 0"])
def test_what_the_configuration_refuses_is_told_by_option(server, option, capsys):
    assert server.main(["serve", "--openai.model_name", "m", *option.split()]) == 2
    assert capsys.readouterr().err.startswith(f"gsm8k_server.py: {option.split()[0]}")


def test_a_truth_is_true_or_false(server, capsys):
    with pytest.raises(SystemExit):
        options(server, "serve --openai.model_name m --slurm maybe")
    assert "'maybe' is neither True nor False" in capsys.readouterr().err
