"""The command sequences of an example trainer's documents, as they stand there, over `recipes/atropos`.

They run in a shell of their own, with a small model in place of the one they name. What ends processes by name is left
out, and their pauses are shortened: our parts wait for each other. A pause of a minute is one for vLLM to load, so it
lasts until that answers. Where `tests/on_gpus.py` runs them beside each other, each has ports of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from boxing_model import make_boxing_model, write_gsm8k
from on_gpus import MARK
from real_engine import free_port, visible_gpu
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "tests" / "golden" / "example_trainer_commands.md").read_text()
BESIDE_OTHERS = MARK in os.environ
SLEEP = f"""#!{sys.executable}
import sys, time, urllib.request
deadline = time.monotonic() + 300
while float(sys.argv[1]) >= 60 and time.monotonic() < deadline:
    try:
        urllib.request.urlopen("http://127.0.0.1:ENGINE/health", timeout=5)
        break
    except OSError:
        time.sleep(0.2)
"""
NUM_STEPS = 100
LEGACY_STEPS = (10, 20) if BESIDE_OTHERS else (20, 30)
"""Of the first and the second call; each starts vLLM, and again every 10 steps, which on a GPU takes a minute."""


def section(mode: str) -> str:
    return re.search(rf"^## {mode}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL).group(1)  # type: ignore[union-attr]


def commands(mode: str) -> str:
    """The section's blocks. Nothing in them ends a process by name: they run on somebody's machine."""
    blocks = re.findall(r"^```sh\n(.*?)^```", section(mode), re.MULTILINE | re.DOTALL)
    return re.sub(r"^pkill .*\n", "", "\n".join(blocks), flags=re.MULTILINE)


def on_ports(script: str, engine: int, trajectories: int) -> str:
    """As they stand, where the ports are those of the documents; else with the options that name others."""
    if trajectories != 8000:
        url = f"http://localhost:{trajectories}"
        script = script.replace("gsm8k_server.py serve", f"gsm8k_server.py serve --env.rollout_server_url {url}")
        script = script.replace("example_trainer/grpo.py", f"example_trainer/grpo.py --atropos-url {url}")
    return script.replace("9001", str(engine))


class Place:
    """A home with the recipe in it, a shell's tools, and what the commands leave there."""

    def __init__(self, home: Path, *, engine: int, trajectories: int) -> None:
        self.home = home
        self.ports = (engine, trajectories)
        self.folder = home / "atropos_stuff" / "atropos"
        self.folder.mkdir(parents=True)
        for name in ("example_trainer", "environments"):
            (self.folder / name).symlink_to(ROOT / "recipes" / "atropos" / name)
        write_gsm8k(self.folder)
        self.model = make_boxing_model(home / "model")
        self._tools = home / "bin"
        self._tools.mkdir()
        for name, text in (
            ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
            ("sleep", SLEEP.replace("ENGINE", str(engine))),
        ):
            (self._tools / name).write_text(text)
            (self._tools / name).chmod(0o755)
        self._logdir = home / "atropos_test"

    def run(self, script: str) -> str:
        """Runs it as a shell does, and ends by pid what it left in the background; what it printed."""
        script = re.sub(r"Qwen/Qwen2\.5-\w+-Instruct", str(self.model), script)
        script = script.replace("/tmp/atropos_test", str(self._logdir))
        gpus = max(1, torch.cuda.device_count())  # of this test's
        script = re.sub(r"(?<=CUDA_VISIBLE_DEVICES=)\d", lambda gpu: visible_gpu(int(gpu[0]) % gpus), script)
        script = on_ports(script, *self.ports)
        assert "pkill" not in script
        environment = os.environ | {"HOME": str(self.home), "PATH": f"{self._tools}:{os.environ['PATH']}"}
        shell = subprocess.Popen(
            ["bash", "-c", script + "\nkill $(jobs -p); wait\n"],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            return shell.communicate(timeout=1500)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            for log in [*self.folder.glob("*.log"), *self._logdir.glob("*.log")]:
                print(f"--- {log.name}\n{log.read_text()[-2500:]}")

    def log(self, name: str) -> str:
        [found] = [*self.folder.glob(name), *self._logdir.glob(name)]
        return found.read_text()


def new_place(home: Path) -> Place:
    engine, trajectories = (free_port(), free_port()) if BESIDE_OTHERS else (9001, 8000)
    for port in (engine, trajectories):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}")
    return Place(home, engine=engine, trajectories=trajectories)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return new_place(tmp_path)


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """Where the first call has ended, and what its trainer said."""
    place = new_place(tmp_path_factory.mktemp("legacy"))
    place.run(legacy_commands(LEGACY_STEPS[0]))
    return place, place.log("trainer_legacy.log")


def legacy_commands(num_steps: int) -> str:
    return commands("none").replace(f"--training-steps {NUM_STEPS}", f"--training-steps {num_steps}")


def steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(checkpoint: Path, model: Path) -> int:
    """Parameters whose values are no longer those that training began with."""
    before, after = load_file(model / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert before.keys() == after.keys()
    return sum(not before[name].equal(after[name]) for name in before)


def test_single_copy(place: Place) -> None:
    printed = place.run(commands("shared_vllm"))
    server, trainer, saved = place.log("vllm.log"), place.log("trainer.log"), place.folder / "trained_model_checkpoints"
    bridge = json.loads((place.folder / "vllm_bridge_config.json").read_text())
    num_params, num_handles = len(bridge["param_names"]), sum(len(rank["storages"]) for rank in bridge["ipc_handles"])
    assert f"Uvicorn running on http://127.0.0.1:{place.ports[0]}" in server
    assert f"[vLLM Patch] Exported {num_handles} IPC handles for single-copy mode" in server
    assert f"[vLLM Patch] ✓ Exported {num_params} params to " in printed  # of the `grep`
    assert f"[Setup] ✓ Attached {num_params} tensors to vLLM's shared memory" in trainer
    assert "[Setup] ✓ Single-copy mode active - using vLLM's tensors directly!" in trainer
    assert f"[2/2] Starting training for {NUM_STEPS} steps" in trainer
    for step in (1, NUM_STEPS):
        told = f"Step {step}/{NUM_STEPS}\n(?:  .*\n)*  \\[SINGLE-COPY\\] Weights updated in-place - step {step}\n"
        assert re.search(told, trainer)
    measured = steps(saved)
    assert [(one["policy_version"], one["sync/bytes"]) for one in measured] == [(n, 0) for n in range(1, NUM_STEPS + 1)]
    assert max(one["sample/staleness_max"] for one in measured) <= 1
    assert sorted(int(path.name[5:]) for path in saved.glob("step_*")) == [*range(3, NUM_STEPS, 3), NUM_STEPS]
    assert changed(saved / f"step_{NUM_STEPS}", place.model) > 10
    assert (saved / "final_model").resolve() == (saved / f"step_{NUM_STEPS}").resolve()


def test_legacy_restarts_vllm(legacy: tuple[Place, str]) -> None:
    first, (place, trainer) = LEGACY_STEPS[0], legacy
    saved = place.home / "atropos_test" / "checkpoints_legacy"
    assert trainer.count("[LEGACY] ✓ vLLM restarted: policy version") == first // 10
    assert f"BENCHMARK SUMMARY (none)\n  Steps: {first}\n" in trainer
    assert {f"step_{n}" for n in range(10, first + 1, 10)} <= {path.name for path in saved.glob("step_*")}
    assert changed(saved / f"step_{first}", place.model) > 10


def test_legacy_goes_on_when_called_again(legacy: tuple[Place, str]) -> None:
    (first, second), (place, _) = LEGACY_STEPS, legacy
    saved = place.home / "atropos_test" / "checkpoints_legacy"
    place.run(legacy_commands(second))
    resumed = f"[Setup] ✓ Resuming after step {first}\n[2/2] Starting training for {second} steps"
    assert resumed in place.log("trainer_legacy.log")
    versions = [(one["step"], one["policy_version"]) for one in steps(saved)]
    assert versions == [(step, step // 10) for step in range(1, second + 1)]
    assert sorted(path.name for path in saved.glob("step_*")) == [f"step_{n}" for n in range(10, second + 1, 10)]
    assert (saved / "final_model").resolve().name == f"step_{second}"


def test_lora_swaps_the_adapter(place: Place) -> None:
    printed = place.run(commands("lora_only"))
    assert " vLLM is ready!" in printed
    saved = place.home / "atropos_test" / "checkpoints_lora"
    trainer = place.log("trainer_lora.log")
    assert trainer.count("[LORA] ✓ Hot-swapped adapter: policy version") == 34
    assert "BENCHMARK SUMMARY (lora_only)" in trainer
    assert [one["policy_version"] for one in steps(saved)][-2:] == [33, 34]
    last = saved / f"adapter_step_{NUM_STEPS}"
    assert json.loads((last / "adapter_config.json").read_text())["r"] == 16
    adapter = load_file(last / "adapter_model.safetensors")
    assert adapter and all(tensor.abs().max() > 0 for tensor in adapter.values())
