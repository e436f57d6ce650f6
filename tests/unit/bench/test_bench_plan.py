"""Which engines a run of the sync benchmark has at once, what it measures, and what it tells however it ends."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from syncline.bench.apart import Outcome, take
from syncline.bench.plan import LINK, TRL, Plan
from syncline.bench.sync import Busy, Case, Result
from syncline.cli import main
from syncline.errors import EngineGone
from syncline.protocols import Receipt, SyncReport

BRIDGES = ("shared", "broadcast", "restart")


def plan(folder: Path, bridges: tuple[str, ...] = BRIDGES, *, gpus: bool = True, with_trl: bool = True) -> Plan:
    def case(bridge: str) -> Case:
        engine_gpu = int(bridge == "broadcast")
        here = {"learner_gpu": 0, "engine_gpu": engine_gpu} if gpus else {}
        return Case(bridge, folder / "small", "small", folder, **here)

    return Plan([case(bridge) for bridge in bridges], folder, with_trl)


def test_restarts_engine_is_what_shared_is_compared_with(tmp_path: Path) -> None:
    names = ["small-shared", "small-restart", "small-broadcast"]
    assert list(plan(tmp_path, with_trl=False).engines()) == names
    assert list(plan(tmp_path).engines()) == [*names, "small-TRL server mode"]
    assert list(plan(tmp_path, ("shared",)).engines()) == ["small-shared", "small-restart"], "TRL is between two GPUs"
    mine = plan(tmp_path).cases
    of_restart, of_shared = (one.config(bridge="restart") for one in (mine[2], mine[0]))
    assert of_restart == of_shared
    differing = mine[0].config().model_dump() | {"bridge": None}
    assert differing == of_shared.model_dump() | {"bridge": None}, "the two whose decoding is compared"


def test_link_and_trl_are_measured_between_the_gpus_of_broadcast(tmp_path: Path) -> None:
    found = plan(tmp_path).comparisons
    assert [(one.label, one.case.learner_gpu, one.case.engine_gpu) for one in found] == [(LINK, 0, 1), (TRL, 0, 1)]
    assert plan(tmp_path, ("shared",)).names == ["small shared", "small plain copy"]


def test_an_engine_that_is_not_there_costs_what_needs_it(tmp_path: Path) -> None:
    mine = plan(tmp_path, gpus=False)
    faults = {case.engine_name(case.bridge): {"url": "", "fault": f"{case.bridge} died"} for case in mine.cases}
    mine.found.write_text(json.dumps(faults))

    def never(*_: Any) -> Any:
        raise AssertionError("no bridge without its engine")

    names, told = mine.names[:3], mine.told
    take(mine.measurements(names, never), names, told, (EngineGone,))
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [line["fault"] for line in lines if "fault" in line] == [
        "EngineGone: shared died",
        "EngineGone: broadcast died",
        "EngineGone: restart died",
    ]


def test_a_deadline_that_has_come_leaves_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sync.json"
    words = ["bench", "sync", "--shape", "tiny", "--bridge", "shared", "--bridge", "restart", "--deadline", "0"]
    assert main([*words, "--folder", str(tmp_path), "--json", str(file)]) == 0
    left_out = dict.fromkeys(("tiny shared", "tiny restart", "tiny plain copy"), "left out: the deadline had come")
    assert json.loads(file.read_text()) == {"results": [], "references": {"tiny": {}}, "left_out": left_out}
    assert [f"{name}: {why}" for name, why in left_out.items()] == capsys.readouterr().out.split("\n")[-4:-1]


def test_an_interrupted_run_prints_and_writes_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = SyncReport(Receipt(1, "d"), 0, 0.010, 0.004, {"digest": 0.001})
    known = Result("tiny", "shared", "vllm 0 on x", idle=[report], busy={"recompute": Busy([report, report])})

    def watch_until_interrupted(names: list[str], *_: Any, outcome: Outcome, **__: Any) -> None:
        outcome.so_far[names[0]] = json.loads(json.dumps(asdict(known)))
        outcome.faults[names[0]] = "interrupted"
        raise KeyboardInterrupt

    monkeypatch.setattr("syncline.bench.apart.watch", watch_until_interrupted)
    monkeypatch.setattr("syncline.bench.engine.together", lambda *_, **__: nullcontext())
    file = tmp_path / "sync.json"
    words = ["bench", "sync", "--shape", "tiny", "--bridge", "shared", "--folder", str(tmp_path), "--json", str(file)]
    assert main(words) == 130
    told = capsys.readouterr().out
    assert "shared" in told and "digest 1.0" in told and "tiny shared: interrupted" in told
    written = json.loads(file.read_text())
    assert written["results"] == [asdict(known)]
    assert written["left_out"] == {"tiny shared": "interrupted", "tiny plain copy": "left out"}
