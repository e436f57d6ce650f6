"""The example trainer's vLLM server: its options, environment variables and lines, without a vLLM."""

import pytest
from recipe_files import load_recipe

from syncline.config import resolve
from syncline.errors import ConfigError


@pytest.fixture
def server(monkeypatch):
    return load_recipe("atropos/example_trainer/vllm_api_server.py", monkeypatch)


def config_of(server, line: str, *, shares: bool = False):
    args, rest = server.parser().parse_known_args(["--model", "m", *line.split()])
    return resolve(server.run_values(args, server.passed_through(rest), shares=shares))


@pytest.mark.parametrize(
    ("environment", "shares"),
    [
        ({}, False),
        ({"VLLM_ENABLE_SHARED_WEIGHTS": "1"}, True),
        ({"VLLM_ENABLE_SHARED_WEIGHTS": "0"}, False),
        ({"NUM_INFERENCE_NODES": "0"}, True),
        ({"NUM_INFERENCE_NODES": "-1"}, False),
    ],
)
def test_the_environment_says_whether_weights_are_shared(server, environment, shares):
    assert server.shares_weights(environment) is shares


def test_options_become_the_configuration(server):
    config = config_of(
        server,
        "--dtype bfloat16 --gpu-memory-utilization 0.4 --enable-lora --max-lora-rank 32 --enforce-eager "
        "--max-model-len 4096 --tensor-parallel-size 2",
    )
    assert (config.model.dtype, config.engine.gpu_memory_utilization, config.engine.enforce_eager) == (
        "bfloat16",
        0.4,
        True,
    )
    assert config.model.lora and (config.model.lora.rank, config.bridge.name) == (32, "lora")
    assert (config.engine.tensor_parallel_size, config.model.max_length, config.engine.extra) == (2, 4096, {})
    with pytest.raises(ConfigError, match="pipeline_parallel_size: 2 gives ranks different layers"):
        config_of(server, "--pipeline-parallel-size 2", shares=True)
    staged = config_of(server, "--pipeline-parallel-size 2 --tensor-parallel-size 2")
    assert (staged.engine.devices, staged.engine.tensor_parallel_size) == ((0, 1, 2, 3), 2)
    assert config_of(server, "--enable-lora --max-loras 3").engine.extra["max_loras"] == 3
    with pytest.raises(ConfigError, match="--max-loras: 'many' is not a whole number"):
        config_of(server, "--max-loras many")
    assert config_of(server, "", shares=True).bridge.name == "shared"
    assert config_of(server, "--enable-lora", shares=True).bridge.name == "shared"
    assert config_of(server, "").bridge.name == "restart"
    assert config_of(server, "").engine.gpu_memory_utilization == 0.9
    assert config_of(server, "", shares=True).engine.gpu_memory_utilization < 0.5, "the learner's part is the larger"


def test_vllms_own_options_go_to_vllm(server):
    words = "--max-num-batched-tokens 8192 --trust-remote-code --no-enable-prefix-caching --block-size=32 --seed 3"
    config = config_of(server, words)
    assert config.run.seed == 3
    assert config.engine.extra == {
        "max_model_len": -1,
        "max_num_batched_tokens": "8192",
        "trust_remote_code": True,
        "enable_prefix_caching": False,
        "block_size": "32",
    }
    with pytest.raises(ConfigError, match="stray: is no option"):
        config_of(server, "stray")


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("--ssl-keyfile k", "put a proxy in front of it"),
        ("--enable-ssl-refresh", "put a proxy in front of it"),
        ("--root-path /x", "put a proxy in front of it"),
        ("--data-parallel-size 2", "start one server a replica"),
        ("--dtype float16", "use bfloat16"),
        ("--host 0.0.0.0", "use 127.0.0.1"),
        ("--port 70000", "give 1 to 65535"),
        ("--pipeline-parallel-size two", "'two' is not a whole number"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(server, line, remedy):
    with pytest.raises(ConfigError, match=remedy):
        config_of(server, line)


def test_what_the_configuration_refuses_is_told_by_option(server, monkeypatch, capsys):
    assert server.main(["--model", "m", "--gpu-memory-utilization", "90"]) == 2
    assert capsys.readouterr().err.startswith("vllm_api_server.py: --gpu-memory-utilization: 90.0 is not usable")
    monkeypatch.setenv("NUM_INFERENCE_NODES", "one")
    assert server.main(["--model", "m"]) == 2
    assert "NUM_INFERENCE_NODES: 'one' is not a whole number" in capsys.readouterr().err


def test_its_lines_are_those_that_are_looked_for(server, capsys):
    server.promised("Exported 4 IPC handles for single-copy mode")
    server.promised("Exported 339 params to vllm_bridge_config.json")
    server.promised("Uvicorn running on http://127.0.0.1:9001")
    assert capsys.readouterr().out.splitlines() == [
        "[vLLM Patch] Exported 4 IPC handles for single-copy mode",
        "[vLLM Patch] ✓ Exported 339 params to vllm_bridge_config.json",
        "Uvicorn running on http://127.0.0.1:9001",
    ]
