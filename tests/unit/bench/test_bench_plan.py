"""Which engines a run of the sync benchmark has at once, what it measures, and what it tells however it ends."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from syncline.bench.apart import Outcome, take
from syncline.bench.plan import LINK, TRL, comparisons, engines, measured, measurements, waves
from syncline.bench.sync import Busy, Case, Result
from syncline.cli import main
from syncline.errors import EngineGone
from syncline.protocols import Receipt, SyncReport

GIB = 1 << 30


def cases(folder: Path, *shapes: str, gpus: bool = True) -> list[Case]:
    return [
        Case(
            bridge,
            folder / shape,
            shape,
            folder,
            learner_gpu=0 if gpus else None,
            engine_gpu=int(bridge == "broadcast") if gpus else None,
        )
        for shape in shapes
        for bridge in ("shared", "broadcast", "restart")
    ]


def test_restarts_engine_is_what_shared_is_compared_with(tmp_path: Path) -> None:
    mine = cases(tmp_path, "small")
    assert list(engines(mine, with_trl=False)) == ["small-shared", "small-restart", "small-broadcast"]
    assert list(engines(mine[:1], with_trl=True)) == ["small-shared", "small-restart"], "TRL is between two GPUs"
    of_restart, of_shared = (one.config(bridge="restart") for one in (mine[2], mine[0]))
    assert of_restart == of_shared
    differing = mine[0].config().model_dump() | {"bridge": None}
    assert differing == of_shared.model_dump() | {"bridge": None}, "the two whose decoding is compared"


def test_link_and_trl_are_measured_between_the_gpus_of_broadcast(tmp_path: Path) -> None:
    found = comparisons(cases(tmp_path, "small"), with_trl=True)
    assert [(one.label, one.case.learner_gpu, one.case.engine_gpu) for one in found] == [(LINK, 0, 1), (TRL, 0, 1)]
    assert measured(cases(tmp_path, "small")[:1], with_trl=True) == ["small shared", "small plain copy"]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [((41, 16), [["a", "b"]]), ((40, 16), [["a"], ["b"]]), ((41, 15), [["a"], ["b"]]), ((0, 0), [["a"], ["b"]])],
)
def test_shapes_start_together_where_they_fit(tmp_path: Path, memory: tuple[int, int], expected: list) -> None:
    """Weights of 1 and 3 GiB, 6 more an engine: on GPU 0 two of 7, two of 9 and a learner's 3 x 3, on GPU 1 7 and 9."""
    mine = cases(tmp_path, "a", "b")
    for shape, gib in (("a", 1), ("b", 3)):
        (tmp_path / shape).mkdir()
        with (tmp_path / shape / "model.safetensors").open("wb") as file:
            file.truncate(gib * GIB)
    mine = [replace(case, kv_cache_bytes=0) for case in mine]
    found = waves(mine, with_trl=False, memory=[GIB * one for one in memory])
    assert [list(dict.fromkeys(case.shape for case in wave)) for wave in found] == expected


def test_on_a_cpu_shapes_follow_each_other(tmp_path: Path) -> None:
    found = waves(cases(tmp_path, "a", "b", gpus=False), with_trl=False, memory=[])
    assert [len(wave) for wave in found] == [3, 3]


def test_an_engine_that_is_not_there_costs_what_needs_it(tmp_path: Path) -> None:
    mine = cases(tmp_path, "small", gpus=False)
    found, told = tmp_path / "found.json", tmp_path / "told"
    faults = {case.engine_name(case.bridge): {"url": "", "fault": f"{case.bridge} died"} for case in mine}
    found.write_text(json.dumps(faults))

    def never(*_: Any) -> Any:
        raise AssertionError("no bridge without its engine")

    names = [case.name for case in mine]
    mapped = measurements(mine, names, build_bridge=never, found=found, told=told, with_trl=False)
    take(mapped, names, told, (EngineGone,))
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
    assert json.loads(file.read_text()) == {"results": [], "references": {}, "left_out": left_out}
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
