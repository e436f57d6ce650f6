"""Exported pieces opened again: the same bytes, and each one's place in the whole parameter."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncline.bridges.handles import (
    Origin,
    export_views,
    fingerprint,
    fingerprint_of,
    move_to_memory_file,
    open_views,
    process_start,
)
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import whole
from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge
from syncline.errors import SyncError
from syncline.protocols import Paused, Receipt

CPU = torch.device("cpu")


def exported(parameter: nn.Parameter, shards: list[tuple[str, Shard]] | None = None) -> dict[str, Any]:
    """One rank's export as it comes over the wire; by default rows 0 to 1 and 2 to 3 of the parameter as two pieces."""
    memory_file = move_to_memory_file([parameter])
    if shards is None:
        upper, lower = parameter.data.split(2)
        shards = [("a", Shard(upper, (8, 3), (4, 0))), ("b", Shard(lower, (2, 3), (0, 0), counted=False))]
    return json.loads(json.dumps(export_views(shards, memory_file=memory_file)))


def test_opened_pieces_are_the_same_bytes_at_their_place() -> None:
    parameter = nn.Parameter(torch.arange(12.0).view(4, 3))
    opened = open_views(exported(parameter), device=CPU)
    assert torch.equal(opened["a"].tensor, torch.arange(6.0).view(2, 3))
    assert (opened["a"].shape, opened["a"].start, opened["a"].counted) == ((8, 3), (4, 0), True)
    assert (opened["b"].shape, opened["b"].start, opened["b"].counted) == ((2, 3), (0, 0), False)
    opened["b"].tensor[1, 2] = -1.0
    assert parameter[3, 2] == -1.0


def test_pieces_of_one_parameter_that_are_not_neighbours_are_refused_by_name() -> None:
    parameter = nn.Parameter(torch.zeros(4, 3))
    pieces = [("qkv_proj.weight", Shard(torch.zeros(2, 3), (8, 3), (start, 0))) for start in (0, 4)]
    with pytest.raises(SyncError, match=r"qkv_proj\.weight is fused in the checkpoint and split over ranks"):
        exported(parameter, pieces)


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("boot_id", "run on one host"),
        ("device", "the same GPU"),
        ("torch_version", "the same torch"),
        ("vllm_version", "the same vLLM"),
        ("model", "the same model.path"),
    ],
)
def test_memory_of_somebody_else_is_refused(field: str, remedy: str) -> None:
    theirs = exported(nn.Parameter(torch.zeros(4, 3)))
    origin = theirs["origin"] | {"vllm_version": "1.0"}
    same = {"model": origin["model"], "vllm_version": "1.0"}
    open_views(theirs | {"origin": origin}, device=CPU, **same)
    with pytest.raises(SyncError, match=f"{field} another is not the learner's .*{remedy}"):
        open_views(theirs | {"origin": origin | {field: "another"}}, device=CPU, **same)


def test_memory_of_a_process_that_ended_is_refused() -> None:
    process = subprocess.Popen(["sleep", "600"])
    theirs = exported(nn.Parameter(torch.zeros(4, 3)))
    theirs["origin"] |= {"pid": process.pid, "started": process_start(process.pid)}
    open_views(theirs, device=CPU)
    process.kill()
    while process_start(process.pid) is not None:  # a corpse that nobody has buried yet is no process
        pass
    with pytest.raises(SyncError, match=f"pid {process.pid} is gone; start the engine again"):
        open_views(theirs, device=CPU)
    process.wait(10)


def test_memory_of_an_earlier_process_of_the_same_pid_is_refused() -> None:
    theirs = exported(nn.Parameter(torch.zeros(4, 3)))
    theirs["origin"]["started"] -= 1
    with pytest.raises(SyncError, match=rf"pid {os.getpid()} started at \d+ is not the process of that pid"):
        open_views(theirs, device=CPU)


def test_a_fingerprint_is_of_names_types_and_whole_shapes_alone() -> None:
    def of(name: str, tensor: torch.Tensor, rows: int) -> str:
        return fingerprint_of({name: Shard(tensor, (rows, 3), (0, 0))})

    weight = torch.zeros(4, 3)
    assert of("w", weight, 8) == of("w", torch.ones(2, 3), 8) == fingerprint({"w": "float32[8, 3]:a digest"})
    others = [of("v", weight, 8), of("w", weight.bfloat16(), 8), of("w", weight, 4)]
    assert of("w", weight, 8) not in others


class TwoRanks:
    """As much of an engine as `attach` asks for, with an export of each of two ranks."""

    name = "engine"

    def __init__(self, parameters: dict[str, str]) -> None:
        self._parameters = parameters

    def wait_until_ready(self, *, timeout_seconds: float) -> None: ...

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool) -> Paused:
        return Paused(Receipt(-1, ""))

    def parameters(self) -> dict[str, str]:
        return self._parameters

    def export(self) -> list[dict[str, Any]]:
        return [{}, {}]


def test_a_learner_of_whole_parameters_refuses_an_engine_of_several_ranks() -> None:
    model = nn.Linear(3, 4, bias=False)
    engine: Any = TwoRanks({"weight": "float32[4, 3]:0"})
    bridge = SharedBridge(
        [engine], Bridge(name="shared"), shards=lambda m: ((name, whole(p)) for name, p in m.named_parameters())
    )
    with pytest.raises(
        SyncError, match=r"2 tensor-parallel ranks and the learner 1; set learner\.tensor_parallel_size"
    ):
        bridge.attach(model)


def test_the_start_of_a_process_whose_name_is_cut_inside_a_character(cut_name: None) -> None:
    with pytest.raises(UnicodeDecodeError):
        Path("/proc/self/stat").read_text()
    assert process_start(os.getpid()) == Origin.here(CPU).started
