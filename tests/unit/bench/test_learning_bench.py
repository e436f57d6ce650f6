"""The learner's benchmark: what it counts, by hand-worked numbers, and that it runs where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from learning import LOSS, Load, Reading, ours, plain_model, table, useful_flops

from syncline.config.schema import Learner, Recomputation

CPU = torch.device("cpu")
PROGRAM = Path(__file__).parents[3] / "benchmarks" / "learner.py"


def reading(name: str, seconds: float, activation_bytes: int | None = None) -> Reading:
    return Reading(
        name=name,
        shape="tiny",
        load="equal 20",
        seconds=seconds,
        useful_tokens=1000,
        computed_tokens=1000,
        microbatch_tokens=500,
        useful_flops=6e9,
        activation_bytes=activation_bytes,
        gradient_norm=1.0,
    )


def test_useful_operations_are_six_a_token_and_weight_of_a_product() -> None:
    load = Load.equal(prompt=4, completion=6, num_rollouts=4, rollouts_per_group=2)
    # a layer: q 64x64, k and v 64x32 with biases, o 64x64, three of 64x128, two norms; then a norm
    layer = 64 * 64 * 2 + 2 * 64 * 32 + (64 + 32 + 32) + 3 * 64 * 128 + 2 * 64
    head = 64 * 151936
    assert useful_flops(plain_model("tiny", load, CPU), load) == 6 * ((2 * layer + 64) * 40 + head * 24)


def test_the_table_compares_with_trls_fastest_whole_path() -> None:
    readings = [reading("ours", 1.0, 512 * 1000), reading("TRL, slow", 4.0), reading("TRL, fast", 2.0, 2048 * 1000)]
    lines = table([*readings, reading("TRL, loss alone", 0.5)], 12e9, "a device")
    [mine] = [line.split() for line in lines if line.startswith("ours")]
    assert mine == ["ours", "1000", "2.00", "x", "50.0", "%", "500", "0.00", "GB", "1", "0.25", "x", "1"]


def test_mixed_lengths_reach_both_bounds() -> None:
    load = Load.mixed(prompt=4, bounds=(2, 30), num_rollouts=8, rollouts_per_group=4)
    assert (min(load.completions), max(load.completions)) == (2, 30)
    assert sum(s.num_sampled for g in load.groups for r in g.rollouts for s in r.samples) == sum(load.completions)


def test_recomputing_changes_no_gradient() -> None:
    load = Load.mixed(prompt=4, bounds=(2, 30), num_rollouts=8, rollouts_per_group=4)
    norms = []
    for what in ("none", "full"):
        running = Learner(loss=LOSS, token_budget=64, recomputation=Recomputation.model_validate({"what": what}))
        norms.append(ours("tiny", load, name=what, running=running, device=CPU, passes=1).gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.slow
def test_it_runs_without_a_gpu(tmp_path: Path) -> None:
    sizes = "--shape tiny --rollouts 4 --group 2 --prompt 4 --completion 8 --shortest 2 --longest 12 --token-budget 64"
    file = tmp_path / "learner.json"
    argv = [sys.executable, str(PROGRAM), *sizes.split(), "--passes", "1", "--no-trl", "--json", str(file)]
    answer = subprocess.run(argv, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert len(json.loads(file.read_text())["readings"]) == 8
    assert answer.stdout.rstrip().splitlines()[-1].startswith("limit: products alone")


@pytest.mark.slow
def test_the_table_comes_when_the_deadline_does(tmp_path: Path) -> None:
    argv = [sys.executable, str(PROGRAM), "--shape", "tiny", "--no-trl", "--deadline", "0"]
    answer = subprocess.run(argv, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("left out: the deadline had come") == 9
