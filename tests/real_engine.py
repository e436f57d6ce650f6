"""A real vLLM and small random models for tests: nothing here is a mock."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from syncline.engines.client import EngineController
from syncline.launch.ports import lease_ports

CHARACTERS = "0123456789+-*= abcdefghijklmnopqrstuvwxyz"
START_SECONDS = 270.0
"""An engine takes 60 to 80 on a GPU's host, and 170 where ten start at once; a test has 300."""


def make_tiny_model(folder: Path, *, seed: int = 0, hidden_size: int = 128, tied: bool = True) -> Path:
    """A random Qwen2 of a few hundred thousand parameters, with a character tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=70,  # not a multiple of 64, so vLLM pads it
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(2, hidden_size // 64),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def vllm_has(text: str, file: str) -> bool:
    """Whether a file of the installed vLLM has this text; found without importing it, which takes seconds."""
    found = find_spec("vllm")
    return found is None or found.origin is None or text in (Path(found.origin).parent / file).read_text()


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)


def visible_gpu(index: int) -> str:
    """The name CUDA has for the GPU that this process sees as `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def engine_values() -> dict:
    """A small engine's section: on a GPU it takes little of it, so that several fit on one, and captures few graphs."""
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]}
    extra = {"kv_cache_memory_bytes": 1 << 30, "compilation_config": graphs}
    on_gpu = {"gpu_memory_utilization": 0.1, "extra": extra}
    return {"kv_cache_bytes": 64 << 20} | (on_gpu if torch.cuda.is_available() else {})


def run_values(model: Path, run_dir: Path, **sections) -> dict:
    """A small run's configuration as plain values; `sections` replace or add whole sections.

    On a GPU half precision is given room: random weights differ there by a few hundredths, and by 0.5 and more where
    one tensor is stale.
    """
    parity: dict = {"prompts": ["12+7=", "the cat"]}
    if torch.cuda.is_available():
        parity |= {"max_mean_abs_diff": 0.15, "max_k3_kl": 0.05}
    return {
        "run": {"dir": str(run_dir), "num_steps": 3, "groups_per_step": 4, "rollouts_per_group": 4},
        "model": {"path": str(model), "max_length": 128},
        "sampling": {"max_tokens": 16},
        "environments": [{"task": "arithmetic"}],
        "engine": engine_values(),
        "parity": parity,
    } | sections


@contextmanager
def running_engine(
    values: dict, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[EngineController]:
    """`syncline serve` as its own process, ready; ended by pid. `options` are more of the command's."""
    with starting_engine(values, folder, *options, environment=environment) as engine:
        wait_until_ready(engine)
        yield engine


@contextmanager
def starting_engine(
    values: dict, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[EngineController]:
    """`running_engine` that is not waited for: several start at once. Its port is leased, since it takes it late."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    with lease_ports({"port": ("127.0.0.1", 0)}) as ports:
        port = str(ports["port"])
        argv = [sys.executable, "-m", "syncline", "serve", str(folder / "run.yaml"), "--port", port, *options]
        full = os.environ | dict(environment or {})
        with (folder / "engine.log").open("w") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=full)
        url = f"http://127.0.0.1:{port}"
        controller: Any = EngineController(url, timeout_seconds=120)
        controller.process, controller.url, controller.log = process, url, folder / "engine.log"
        try:
            yield controller
        finally:
            controller.close()
            _end(process)


def wait_until_ready(*engines: Any) -> None:
    """Of `starting_engine`; each slows the others' start. Raises `AssertionError` with the end of its log for one that
    ended, or is late."""
    deadline = time.monotonic() + START_SECONDS * len(engines)
    for engine in engines:
        while engine._health_fault() is not None:
            if engine.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the engine did not start:\n{engine.log.read_text()[-10000:]}")
            time.sleep(0.5)


@contextmanager
def told_process(
    argv: list[str], told: str, *, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A process that has printed `told` as its first line; killed in any case, since it may never end."""
    full = os.environ | dict(environment or {})
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=full)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == told + "\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def _end(process: subprocess.Popen) -> None:
    """SIGTERM, then SIGKILL to the process group this test started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
