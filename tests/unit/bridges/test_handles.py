"""Exported pieces opened again: the same bytes, and each one's place in the whole parameter."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from syncline.bridges.handles import export_views, move_to_memory_file, open_views
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
    [("boot_id", "run on one host"), ("device", "the same GPU"), ("torch_version", "the same torch")],
)
def test_memory_of_somebody_else_is_refused(field: str, remedy: str) -> None:
    theirs = exported(nn.Parameter(torch.zeros(4, 3)))
    theirs["origin"][field] = "another"
    with pytest.raises(SyncError, match=f"{field} another is not the learner's .*{remedy}"):
        open_views(theirs, device=CPU)


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
