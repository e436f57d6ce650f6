"""A collection is killed, and an engine under another: nothing is lost or done twice. Real engines, real kills."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from real_engine import engine_values, make_tiny_model, run_values, running_engine

from syncline.engines.client import EngineClient
from syncline.types import Completion, SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NUM_QUESTIONS = 8
NUM_ITEMS = NUM_QUESTIONS * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("engine")
    values = run_values(model, folder / "run")
    values["model"] |= {"max_length": 500}
    values["sampling"] = {"max_tokens": 100}
    with running_engine(values, folder) as engine:
        yield engine.url


def pipeline_file(folder: Path, model: Path, **sections: dict) -> Path:
    rows = [
        {
            "question": f"tom has {n} pens and buys 48 more. how many?",
            "answer": f"{n}+48=<<{n}+48={n + 48}>>{n + 48}\n#### {n + 48}",
        }
        for n in range(11, 11 + NUM_QUESTIONS)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model), "max_length": 256, "lora": {"rank": 8}},
        "engine": engine_values() | {"max_num_seqs": 16},
        "collect": {
            "questions": {"path": str(folder / "rows.jsonl")},
            "max_tokens": 60,
            "requests_per_engine": 8,
            "lost_after_seconds": 10,
        },
        "eval": {"sets": [{"name": "made", "made": {}}], "max_tokens": 32},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    return folder / "pipeline.yaml"


def start(file: Path, *options: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "syncline", "collect", str(file), *options]
    with (file.parent / "collect.log").open("a") as log:
        return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)


def wait_for_lines(file: Path, process: subprocess.Popen, count: int) -> Path:
    """The attempts file, once it has so many lines."""
    deadline = time.monotonic() + 240
    while True:
        found = list((file.parent / "run").glob("collect-*/attempts.jsonl"))
        if found and found[0].read_bytes().count(b"\n") >= count:
            return found[0]
        assert process.poll() is None and time.monotonic() < deadline, (file.parent / "collect.log").read_text()[-4000:]
        time.sleep(0.02)


def finish(file: Path, process: subprocess.Popen) -> tuple[list[dict], dict]:
    """The rollouts and the stage's facts."""
    assert process.wait(300) == 0, (file.parent / "collect.log").read_text()[-4000:]
    [rollouts] = (file.parent / "run").glob("collect-*/rollouts.jsonl")
    manifest = json.loads((rollouts.parent / "manifest.json").read_text())
    return [json.loads(line) for line in rollouts.read_text().splitlines()], manifest["facts"]


def test_long_prompts_with_seeds_are_answered_all_at_once(engine_url: str) -> None:
    """Together they are more than vLLM reads in a step; a seeded one read in parts would end a CPU's engine."""

    async def sample(prompts: list[tuple[int, ...]]) -> list[list[Completion]]:
        async with EngineClient(engine_url, timeout_seconds=120) as client:
            asked = (client.generate(p, SamplingParams(2, temperature=1.0, seed=i)) for i, p in enumerate(prompts))
            return await asyncio.gather(*asked)

    answers = asyncio.run(sample([tuple(3 + (i + j) % 60 for j in range(400)) for i in range(16)]))
    assert len(answers) == 16 and all(completion.token_ids for [completion] in answers)


def test_a_killed_collection_goes_on_at_the_exact_item(engine_url: str, model: Path, tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, model)
    first = start(file, "--engine-url", engine_url)
    attempts = wait_for_lines(file, first, 8)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    before = attempts.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    num_before = whole.count(b"\n")
    assert 8 <= num_before < NUM_ITEMS, "killed too late to show anything"

    rollouts, facts = finish(file, start(file, "--engine-url", engine_url))
    after = attempts.read_bytes()
    assert after.startswith(whole), "what was on disk is still there, as it was"
    assert (facts["resumed"], facts["sampled"]) == (num_before, NUM_ITEMS - num_before)
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == NUM_ITEMS == len(rollouts)
    assert len({rollout["seed"] for rollout in rollouts}) == NUM_ITEMS
    assert all(len(r["token_ids"]) == len(r["logprobs"]) == r["num_tokens"] > 0 for r in rollouts)


@pytest.mark.slow
def test_a_dead_engines_work_is_done_by_another(model: Path, tmp_path: Path) -> None:
    """Two replicas that the verb starts, sampling from an adapter that was never merged; one is killed."""
    adapter = make_adapter(model, tmp_path / "adapter")
    file = pipeline_file(
        tmp_path / "p", model, engine={"num_replicas": 2, "devices": [0, 1]}, collect={"adapter": str(adapter)}
    )
    process = start(file)
    wait_for_lines(file, process, 10)
    running = json.loads((tmp_path / "p" / "run" / "engines" / "processes.json").read_text())["processes"]
    os.kill(running[1]["pid"], signal.SIGKILL)
    rollouts, facts = finish(file, process)
    assert len({rollout["key"] for rollout in rollouts}) == NUM_ITEMS == facts["sampled"]
    assert facts["sampled_again"] > 0
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{one['pid']}").exists() for one in running):
        assert time.monotonic() < deadline, "an engine outlived the collection"
        time.sleep(0.1)


def make_adapter(model: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_recipe_writes_the_originals_file(engine_url: str, model: Path, tmp_path: Path) -> None:
    pipeline_file(tmp_path, model)
    out = tmp_path / "data" / "abel_regime_w_rollouts.jsonl"
    recipe = Path(__file__).parents[2] / "recipes" / "regime_w" / "collect_rollouts_abel_vllm.py"
    options = ["--model_path", str(model), "--data_path", str(tmp_path / "rows.jsonl"), "--out_path", str(out)]
    options += ["--n_samples", "2", "--max_tokens", "8", "--max_model_len", "500", "--engine_url", engine_url]
    done = subprocess.run([sys.executable, str(recipe), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Built 8 Regime W arms" in done.stdout and "Total rollouts: 2\nTrajectories per rollout: 8" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["gold_answer"] for row in rows] == ["11+48=<<11+48=59>>59\n#### 59", "12+48=<<12+48=60>>60\n#### 60"]
    arms = [f"{style}_{i}" for style in ("wolfram", "maudlin") for i in range(4)]
    assert [one["arm_name"] for one in rows[0]["trajectories"]] == arms
    fields = {"full_text", "answer", "reasoning", "num_tokens", "reward", "correct", "arm_name"}
    assert all(set(one) == fields and one["num_tokens"] <= 8 for row in rows for one in row["trajectories"])
