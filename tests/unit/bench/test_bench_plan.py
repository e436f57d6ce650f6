"""Which engines a run of the sync benchmark has at once, what it measures, and what it tells however it ends."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from syncline.bench.apart import Outcome, take
from syncline.bench.case import Case
from syncline.bench.plan import LINK, TRL, Plan
from syncline.bench.reference import link
from syncline.bench.sync import Busy, Result
from syncline.bridges.ranks import ONE_RANK
from syncline.cli import main
from syncline.errors import EngineGone
from syncline.protocols import Receipt, SyncReport

BRIDGES = ("shared", "broadcast", "restart")


def plan(
    folder: Path,
    bridges: tuple[str, ...] = BRIDGES,
    *,
    sizes: tuple[int, ...] = (1,),
    gpus: bool = True,
    with_trl: bool = True,
) -> Plan:
    def case(bridge: str, size: int) -> Case:
        first = int(bridge == "broadcast")
        engine_gpus = tuple(range(first, first + size)) if gpus else ()
        return Case(bridge, folder / "small", "small", folder, tensor_parallel=size, engine_gpus=engine_gpus)

    return Plan([case(bridge, size) for size in sizes for bridge in bridges], folder, with_trl)


@pytest.fixture
def told_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, tuple]]:
    """`told_to_start(num_gpus, *options)`: of each engine of such a run, by name: its ranks, its GPUs, and the ranks of
    the learner beside it."""
    found: dict[str, tuple] = {}

    def serve(values: Mapping[str, Any], log: Path, *, gpus: tuple[int, ...], **_: str) -> None:
        sides = (values["engine"], values["learner"])
        assert sides[0]["devices"] == list(gpus) or not gpus
        found[log.stem] = (sides[0]["tensor_parallel_size"], gpus, sides[1]["tensor_parallel_size"])

    @contextmanager
    def together(starts: Mapping[str, Callable[[], None]], *_: Any, **__: Any) -> Iterator[None]:
        for start in starts.values():
            start()
        yield

    def run(num_gpus: int, *options: str) -> dict[str, tuple]:
        monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
        monkeypatch.setattr("syncline.bench.case.serve", serve)
        monkeypatch.setattr("syncline.bench.engine.together", together)
        monkeypatch.setattr("syncline.bench.apart.watch", lambda *_, **__: None)
        words = ["bench", "sync", "--shape", "tiny", "--no-trl", "--folder", str(tmp_path), *options]
        return found if main(words) == 1 else {}  # nothing is measured

    return run


def test_engines_have_a_gpu_a_rank_and_the_learner_of_broadcast_its_own(told_to_start: Any) -> None:
    words = ["--bridge", "shared", "--bridge", "broadcast", "--tensor-parallel", "1", "2"]
    assert told_to_start(3, *words) == {
        "tiny-shared": (1, (0,), 1),
        "tiny-restart": (1, (0,), 1),
        "tiny-broadcast": (1, (1,), 1),
        "tiny-shared-tp2": (2, (0, 1), 2),
        "tiny-restart-tp2": (2, (0, 1), 1),
        "tiny-broadcast-tp2": (2, (1, 2), 1),
    }


def test_bridges_nobody_asked_for_are_left_out_where_their_gpus_lack(told_to_start: Any) -> None:
    started = told_to_start(2, "--tensor-parallel", "1", "2")
    assert [name for name in started if "broadcast" in name] == ["tiny-broadcast"]
    assert {name for name in started if name.endswith("tp2")} == {
        "tiny-shared-tp2",
        "tiny-lora-tp2",
        "tiny-restart-tp2",
    }
    assert started["tiny-lora-tp2"] == (2, (0, 1), 1)


def test_a_cpu_has_any_number_of_ranks(told_to_start: Any) -> None:
    words = ["--bridge", "shared", "--bridge", "broadcast", "--tensor-parallel", "2"]
    started = told_to_start(0, *words)
    assert started == dict.fromkeys(("tiny-shared-tp2", "tiny-broadcast-tp2", "tiny-restart-tp2"), (2, (), 1)) | {
        "tiny-shared-tp2": (2, (), 2)
    }


@pytest.mark.parametrize(
    ("num_gpus", "words", "fault"),
    [
        (1, "--bridge broadcast", "--bridge: 'broadcast' sends from one GPU to another, and this machine shows 1"),
        (1, "--tensor-parallel 1 2", "--tensor-parallel: 2 over 'shared' takes 2 GPUs, and this machine shows 1"),
        (
            2,
            "--bridge shared --bridge broadcast --tensor-parallel 2",
            "--tensor-parallel: 2 over 'broadcast' takes 3 GPUs, the learner having its own, and this machine shows 2",
        ),
        (8, "--tensor-parallel 4", "--tensor-parallel: 4 does not divide the 2 attention heads"),
        (0, "--tensor-parallel 0", "--tensor-parallel: 0 is no number of ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_anything_starts(
    told_to_start: Any, capsys: pytest.CaptureFixture[str], num_gpus: int, words: str, fault: str
) -> None:
    assert told_to_start(num_gpus, *words.split()) == {}
    assert fault in capsys.readouterr().err


def test_who_measures_takes_what_wants_as_many_ranks(tmp_path: Path) -> None:
    mine = plan(tmp_path, ("shared", "broadcast"), sizes=(1, 2, 4), with_trl=False)
    alone = ["small shared", "small broadcast", "small broadcast, TP 2", "small broadcast, TP 4"]
    links = [f"small {LINK}", f"small {LINK}, TP 2", f"small {LINK}, TP 4"]
    assert mine.names == [*alone, *links, "small shared, TP 2", "small shared, TP 4"]
    assert mine.leading(mine.names) == (1, [*alone, *links])
    assert mine.leading(mine.names[5:]) == (1, links[1:])
    assert mine.leading(mine.names[-2:]) == (2, ["small shared, TP 2"])
    assert mine.leading(mine.names[-1:]) == (4, ["small shared, TP 4"])


def test_who_measures_several_ranks_starts_them_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("syncline.cli.bench.run_ranks", lambda number, _: started.append(number) or 7)
    words = ["bench", "sync", "--shape", "tiny", "--bridge", "shared", "--tensor-parallel", "1", "2"]
    names = ["tiny shared, TP 2", "tiny plain copy"]
    assert main([*words, "--folder", str(tmp_path), "--take", json.dumps(names)]) == 7
    assert started == [2]


def test_restarts_engine_is_what_shared_is_compared_with(tmp_path: Path) -> None:
    names = ["small-shared", "small-restart", "small-broadcast"]
    assert list(plan(tmp_path, with_trl=False).engines()) == names
    assert list(plan(tmp_path).engines()) == [*names, "small-TRL server mode"]
    assert list(plan(tmp_path, ("shared",)).engines()) == ["small-shared", "small-restart"], "TRL is between two GPUs"
    mine = plan(tmp_path, sizes=(2,)).cases
    of_restart, of_shared = (one.config(bridge="restart") for one in (mine[2], mine[0]))
    assert of_restart == of_shared
    differing = mine[0].config().model_dump() | {"bridge": None, "learner": None}
    assert differing == of_shared.model_dump() | {"bridge": None, "learner": None}, "the two whose decoding is compared"


def test_link_and_trl_are_measured_between_the_gpus_of_broadcast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncline.bench.plan.link", lambda _, *, gpus, repeats: gpus)
    monkeypatch.setattr("syncline.bench.plan.trl_server", lambda model, log, *, gpus, kv_cache_bytes: gpus)
    mine = plan(tmp_path, sizes=(1, 2))
    found, starts = mine.comparisons, mine.engines()
    assert [one.prepare() for one in found if one.kind == LINK] == [(0, 1), (0, 1, 2)]
    assert [starts[f"small-{TRL}{size}"]() for size in ("", "-tp2")] == [(1,), (1, 2)]
    assert [(one.label, one.case.engine_gpus) for one in found] == [
        (LINK, (1,)),
        (TRL, (1,)),
        (f"{LINK}, TP 2", (1, 2)),
        (f"{TRL}, TP 2", (1, 2)),
    ]
    assert plan(tmp_path, ("shared",), sizes=(1, 2)).names == ["small shared", "small plain copy", "small shared, TP 2"]


@pytest.mark.skipif(0 < torch.cuda.device_count() < 3, reason="needs 3 GPUs")
def test_the_link_goes_to_every_rank_of_the_engine() -> None:
    processes = link(1 << 10, gpus=(0, 1, 2), repeats=4)
    processes.wait_until_imported()
    assert len(seconds := processes.seconds()) == 4 and min(seconds) > 0


def test_an_engine_that_is_not_there_costs_what_needs_it(tmp_path: Path) -> None:
    mine = plan(tmp_path, gpus=False)
    faults = {case.engine_name(case.bridge): {"url": "", "fault": f"{case.bridge} died"} for case in mine.cases}
    mine.found.write_text(json.dumps(faults))

    def never(*_: Any) -> Any:
        raise AssertionError("no bridge without its engine")

    names, told = mine.names[:3], mine.told
    take(mine.measurements(names, never, ranks=ONE_RANK), names, told, (EngineGone,))
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [line["fault"] for line in lines if "fault" in line] == [
        "EngineGone: shared died",
        "EngineGone: broadcast died",
        "EngineGone: restart died",
    ]


def test_a_deadline_that_has_come_leaves_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sync.json"
    words = ["bench", "sync", "--shape", "tiny", "--bridge", "shared", "--bridge", "restart", "--deadline", "0"]
    assert main([*words, "--folder", str(tmp_path), "--json", str(file)]) == 1
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
