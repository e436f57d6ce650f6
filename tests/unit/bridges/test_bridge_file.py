"""`vllm_bridge_config.json`: where it is written and looked for, and every way in which it can be somebody else's."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncline.bridges import bridge_file
from syncline.bridges.bridge_file import AUTO, FILE_NAME, find_bridge_file, write_bridge_file
from syncline.bridges.handles import export_views, move_to_memory_file, open_views
from syncline.bridges.receipt import whole
from syncline.errors import SyncError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where the documented order leads, as folders of this test."""
    folders = {name: tmp_path / name for name in ("logdir", "working", "fallback")}
    folders["working"].mkdir()
    monkeypatch.chdir(folders["working"])
    monkeypatch.setenv("LOGDIR", str(folders["logdir"]))
    monkeypatch.setattr(bridge_file, "FALLBACK_FOLDER", folders["fallback"])
    return folders


def handles() -> list[dict[str, Any]]:
    weight = nn.Parameter(torch.arange(12.0).view(4, 3))
    return [export_views([("w", whole(weight.data))], memory_file=move_to_memory_file([weight]), vllm_version="0.32.0")]


def write(explicit: str = AUTO, **changes: Any) -> Path:
    return write_bridge_file(explicit, **{"url": "http://127.0.0.1:1", "model": "m", "handles": handles()} | changes)


def test_what_is_written_is_found_and_opens_the_same_bytes() -> None:
    path = write()
    found = find_bridge_file(AUTO, model="m", device=CPU)
    assert (found.path, found.url) == (path, "http://127.0.0.1:1")
    assert torch.equal(open_views(found.handles[0], device=CPU)["w"].tensor, torch.arange(12.0).view(4, 3))


def test_an_engine_that_is_still_loading_is_waited_for(
    caplog: pytest.LogCaptureFixture, places: dict[str, Path]
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            write()

    find = {"model": "m", "device": CPU, "sleep": sleep}
    assert find_bridge_file(AUTO, **find, patience_seconds=60).url == "http://127.0.0.1:1"
    assert sum(slept) == 3 * bridge_file.POLL_SECONDS
    assert "waiting 60 s for an engine that shares weights" in caplog.text
    assert all(str(folder / "vllm_bridge_config.json") in caplog.text for folder in places.values())
    caplog.clear()
    with pytest.raises(SyncError, match="no vllm_bridge_config"):
        find_bridge_file("elsewhere", **find, patience_seconds=2)
    assert f"shares weights:\n  {Path('elsewhere').absolute()}" in caplog.text, "said at the start, not after the wait"
    assert sum(slept) == 3 * bridge_file.POLL_SECONDS + 2


def test_the_file_is_this_users_alone_and_says_what_the_trainers_document_promises(places: dict[str, Path]) -> None:
    path = write()
    assert path == places["logdir"] / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = json.loads(path.read_text())
    assert content["param_names"] == ["w"]
    assert content["param_mappings"] == {"w": {"shape": [4, 3], "dtype": "torch.float32", "device": "cpu"}}
    told = {key: content[key] for key in ("model", "tp_degree", "dp_shard_degree", "num_params")}
    assert told == {"model": "m", "tp_degree": 1, "dp_shard_degree": 1, "num_params": 1}
    assert content["shared_weights_enabled"] and content["single_copy_enabled"] and content["ipc_handles"]


def test_it_is_replaced_as_a_whole(places: dict[str, Path]) -> None:
    write(url="http://127.0.0.1:1")
    write(url="http://127.0.0.1:2")
    assert find_bridge_file(AUTO, model="m", device=CPU).url == "http://127.0.0.1:2"
    assert [path.name for path in places["logdir"].iterdir()] == [FILE_NAME]


def test_the_order_is_the_documented_one(places: dict[str, Path], tmp_path: Path) -> None:
    for name in ("fallback", "working", "logdir"):
        written = write(str(places[name] / FILE_NAME))
        assert find_bridge_file(AUTO, model="m", device=CPU).path == written
    explicit = write(str(tmp_path / "mine.json"))
    assert find_bridge_file(str(explicit), model="m", device=CPU).path == explicit
    assert find_bridge_file(str(places["working"]), model="m", device=CPU).path == places["working"] / FILE_NAME


def test_without_logdir_it_is_written_to_the_working_folder(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOGDIR")
    assert write() == places["working"] / FILE_NAME


def test_none_is_a_message_with_every_place_and_the_remedy(places: dict[str, Path]) -> None:
    with pytest.raises(SyncError, match=r"start the engine with bridge\.name = shared and --bridge-config") as told:
        find_bridge_file(AUTO, model="m", device=CPU)
    assert all(str(folder / FILE_NAME) in str(told.value) for folder in places.values())
    with pytest.raises(SyncError, match=r"elsewhere\.json"):
        find_bridge_file("elsewhere.json", model="m", device=CPU)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("boot_id", "another", "boot_id another is not the learner's"),
        ("device", "GPU-0", "device GPU-0 is not the learner's cpu"),
        ("torch_version", "1.0", "torch_version 1.0 is not the learner's"),
        ("started", 1, "is not the process of that pid that started at 1; start the engine again"),
        ("pid", 2**22 + 1, "pid 4194305 is gone; start the engine again"),
    ],
)
def test_a_stale_file_is_refused_by_path_and_field_and_not_skipped(
    places: dict[str, Path], field: str, value: Any, told: str
) -> None:
    write(str(places["working"] / FILE_NAME))
    stale = handles()
    stale[0]["origin"][field] = value
    path = write(handles=stale)
    with pytest.raises(SyncError, match=rf"{path}: .*{told}"):
        find_bridge_file(AUTO, model="m", device=CPU)


def test_another_model_is_refused() -> None:
    path = write(model="Qwen/Qwen2.5-0.5B")
    with pytest.raises(SyncError, match=f"{path}: model Qwen/Qwen2.5-0.5B is not the learner's m; set model.path"):
        find_bridge_file(AUTO, model="m", device=CPU)


@pytest.mark.parametrize("text", ["{", "{}", '{"url": "u", "model": "m", "ipc_handles": []}', "[]", '{"url": 1}'])
def test_a_file_of_another_shape_is_refused(text: str) -> None:
    path = write()
    path.write_text(text)
    with pytest.raises(SyncError, match=f"{path}: is not what .* writes .*remove it"):
        find_bridge_file(AUTO, model="m", device=CPU)


def test_a_file_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    with pytest.raises(SyncError, match=rf"{path}: its owner: user \d+ is not this one \(4711\)"):
        find_bridge_file(AUTO, model="m", device=CPU)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SyncError, match=r"cannot be written: .*set LOGDIR"):
        write(str(tmp_path / "file" / FILE_NAME))
