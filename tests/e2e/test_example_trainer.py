"""The command sequences of an example trainer's documents, as they stand there, over `recipes/atropos`.

They run in a shell of their own, with a small model in place of the one they name. What ends processes by name is left
out, and their pauses are shortened: our parts wait for each other. A pause of a minute is one for vLLM to load, so it
lasts until that answers.
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
from boxing_model import make_boxing_model, write_gsm8k
from real_engine import visible_gpu
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "tests" / "golden" / "example_trainer_commands.md").read_text()
ENGINE, TRAJECTORIES = "http://127.0.0.1:9001", "http://127.0.0.1:8000"
SLEEP = f"""#!{sys.executable}
import sys, time, urllib.request
deadline = time.monotonic() + 300
while float(sys.argv[1]) >= 60 and time.monotonic() < deadline:
    try:
        urllib.request.urlopen("{ENGINE}/health", timeout=5)
        break
    except OSError:
        time.sleep(0.2)
"""
NUM_STEPS = 100


def section(mode: str) -> str:
    return re.search(rf"^## {mode}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL).group(1)  # type: ignore[union-attr]


def commands(mode: str) -> str:
    """The section's blocks. Nothing in them ends a process by name: they run on somebody's machine."""
    blocks = re.findall(r"^```sh\n(.*?)^```", section(mode), re.MULTILINE | re.DOTALL)
    return re.sub(r"^pkill .*\n", "", "\n".join(blocks), flags=re.MULTILINE)


class Place:
    """A home with the recipe in it, a shell's tools, and what the commands leave there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "atropos_stuff" / "atropos"
        self.folder.mkdir(parents=True)
        for name in ("example_trainer", "environments"):
            (self.folder / name).symlink_to(ROOT / "recipes" / "atropos" / name)
        write_gsm8k(self.folder)
        self.model = make_boxing_model(home / "model")
        self._tools = home / "bin"
        self._tools.mkdir()
        for name, text in (("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'), ("sleep", SLEEP)):
            (self._tools / name).write_text(text)
            (self._tools / name).chmod(0o755)
        self._logdir = home / "atropos_test"

    def run(self, script: str) -> str:
        """Runs it as a shell does, and ends by pid what it left in the background; what it printed."""
        script = re.sub(r"Qwen/Qwen2\.5-\w+-Instruct", str(self.model), script)
        script = script.replace("/tmp/atropos_test", str(self._logdir))
        script = re.sub(r"(?<=CUDA_VISIBLE_DEVICES=)\d", lambda gpu: visible_gpu(int(gpu[0])), script)  # of this test's
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


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for url in (ENGINE, TRAJECTORIES):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    return Place(tmp_path)


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
    assert "Uvicorn running on http://127.0.0.1:9001" in server
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


def test_legacy_restarts_vllm_and_resumes(place: Place) -> None:
    script = commands("none").replace(f"--training-steps {NUM_STEPS}", "--training-steps 20")
    place.run(script)
    saved = place.home / "atropos_test" / "checkpoints_legacy"
    trainer = place.log("trainer_legacy.log")
    assert trainer.count("[LEGACY] ✓ vLLM restarted: policy version") == 2
    assert "BENCHMARK SUMMARY (none)\n  Steps: 20\n" in trainer
    assert [one["policy_version"] for one in steps(saved)] == [0] * 9 + [1] * 10 + [2]
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_10", "step_20"]
    place.run(script.replace("--training-steps 20", "--training-steps 30"))
    assert "[Setup] ✓ Resuming after step 20\n[2/2] Starting training for 30 steps" in place.log("trainer_legacy.log")
    assert [one["step"] for one in steps(saved)] == list(range(1, 31))
    assert changed(saved / "final_model", place.model) > 10


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
