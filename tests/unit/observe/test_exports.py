"""The sinks of others: the real libraries where installed, read back; and what happens when one fails."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncline.config.schema import Observe
from syncline.errors import ConfigError
from syncline.observe.exports import ExportingSink, missing_packages, open_exports
from syncline.observe.files import read_lines
from syncline.observe.sinks import METRICS_FILE, JsonlSink

ROWS = {3: {"reward": 0.25, "sync/pause_seconds": 0.5}, 4: {"reward": 0.75, "sync/pause_seconds": 0.125}}


def written(folder: Path, name: str) -> dict[int, float]:
    """Logs two steps through one library. Returns what the run's own file has."""
    exports = open_exports(Observe(sinks=(name,), project="project"), folder, resumed_step=2)
    sink = ExportingSink(JsonlSink(folder, resumed_step=2), exports)
    for step, metrics in ROWS.items():
        sink.log(step, metrics)
    sink.close()
    lines = read_lines(folder / METRICS_FILE)
    assert [line[f"observe/{name}/failures"] for line in lines] == [0.0, 0.0]
    return {line["step"]: line["reward"] for line in lines}


def test_tensorboard_has_every_step(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    own = written(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "from-step-2")).Reload()
    assert {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors("reward")} == own
    assert "sync/pause_seconds" in events.Tags()["tensors"]


def test_wandb_has_every_step(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    own = written(tmp_path / "gsm8k", "wandb")
    wandb.teardown()
    [path] = (tmp_path / "gsm8k" / "wandb").glob("offline-run-*/run-*.wandb")
    found = {}
    for record in map(Record.FromString, wandb_records(path.read_bytes())):
        if record.HasField("run"):
            assert (record.run.project, record.run.run_group) == ("project", "gsm8k")
        if record.HasField("history"):
            values = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            found[record.history.step.num] = values["reward"]
    assert found == own


def test_trackio_has_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    own = written(tmp_path / "gsm8k", "trackio")
    logs = SQLiteStorage.get_logs("project", "gsm8k from-step-2")
    assert {line["step"]: line["reward"] for line in logs} == own


def wandb_records(file: bytes) -> Iterator[bytes]:
    """As long as all of them fit in one block of 32 KiB: a head of 7 bytes, then length and record by turns."""
    at = 7
    while at + 7 <= min(len(file), 32 << 10):
        length = int.from_bytes(file[at + 4 : at + 6], "little")
        yield file[at + 7 : at + 7 + length]
        at += 7 + length


class Broken:
    """Takes nothing, and does not end before it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def log(self, metrics, step=None) -> None:
        raise OSError(28, "No space left on device")

    def finish(self) -> None:
        self.let_go.wait()


class Recorded:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics, step=None) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        self.steps.append(-1)


def test_a_library_that_fails_is_counted_and_said_and_stops_nothing(tmp_path, caplog):
    broken, other = Broken(), Recorded()
    own = JsonlSink(tmp_path, resumed_step=0)
    sink = ExportingSink(own, {"wandb": broken, "trackio": other}, finish_seconds=0.0)
    for step in (1, 2, 3):
        sink.log(step, {"reward": 1.0})
    sink.close()
    broken.let_go.set()
    lines = read_lines(tmp_path / METRICS_FILE)
    assert [line["observe/wandb/failures"] for line in lines] == [0.0, 1.0, 2.0]
    assert "wandb did not take step 1: OSError: [Errno 28] No space left on device" in caplog.text
    assert "wandb had not finished after 0 s" in caplog.text
    assert other.steps[:3] == [1, 2, 3]


def test_a_missing_package_is_named_and_one_that_does_not_start_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "wandb").mkdir()
    observe = Observe(sinks=("wandb", "tensorboard"))
    assert [fault.partition(";")[0] for fault in missing_packages(observe)] == [
        "observe.sinks: 'wandb' needs the package wandb",
        "observe.sinks: 'tensorboard' needs the package tensorboard",
    ], "a folder that wandb left here is no package"
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        open_exports(observe, tmp_path / "run", resumed_step=0)
    (tmp_path / "wandb" / "__init__.py").write_text("def init(**_): raise OSError('no API key')\nSettings = dict\n")
    with pytest.raises(ConfigError, match=r"'wandb' did not start \(OSError: no API key\)"):
        open_exports(Observe(sinks=("wandb",)), tmp_path / "run", resumed_step=0)
