"""What an engine says it holds, and what it refuses to sample from: over real measurements of two ranks' tensors."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from syncline.bridges.manifest import Shard
from syncline.bridges.measure import Measure
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.engines.vllm.gate import Gate
from syncline.engines.vllm.served import Served
from syncline.errors import EngineError
from syncline.protocols import Receipt


class Engine:
    """As much of vLLM as `Served` asks for: two ranks, each with half the rows of `w`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.output_processor = SimpleNamespace(request_states={})
        self.engine_core = SimpleNamespace(outputs_queue=None)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))
        self.models = [nn.ParameterDict({"w": torch.full((2, 6), float(rank))}) for rank in range(2)]
        self._measures = [
            Measure(lambda model, first=2 * rank: [("w", Shard(model["w"], (4, 6), (first, 0)))]) for rank in range(2)
        ]

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        del args
        self.calls.append(method)
        if method == "syncline_pieces":
            return [{"value": measure.pieces} for measure in self._measures]
        readings = [one.read(model) for one, model in zip(self._measures, self.models, strict=True)]
        return [{"value": list(reading)} for reading in readings]

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    def held(self, policy_version: int) -> Receipt:
        """What the weights are now, computed the plain way."""
        weights = torch.cat([model["w"].detach() for model in self.models])
        return Receipt(policy_version, model_digest(parameter_digests([("w", weights)])))


@pytest.fixture
def served() -> Served:
    """A paused engine of version 3."""
    served = Served(Engine(), Gate(3), {})

    async def pause() -> None:
        served.gate.freeze(served.gate.close())
        await served.remeasure()

    asyncio.run(pause())
    served.engine.calls.clear()
    return served


def test_pieces_are_asked_for_once(served: Served) -> None:
    for _ in range(2):
        served.engine.models[0]["w"].data.add_(1)
        asyncio.run(served.remeasure())
        assert served.held == served.engine.held(3)
    assert served.engine.calls == ["syncline_measure"] * 2


def test_weights_that_are_what_was_published_are_named_and_resumed(served: Served) -> None:
    served.engine.models[1]["w"].data.add_(1)
    expected = served.engine.held(4)
    answer = asyncio.run(served.name(expected, pause=1, resume=True))
    assert (answer["policy_version"], answer["digest"], answer["paused"]) == (4, expected.digest, False)
    assert served.engine.calls[-1] == "resume"


def test_other_weights_get_no_version_and_cannot_be_resumed(served: Served) -> None:
    answer = asyncio.run(served.name(Receipt(4, "0" * 64), pause=1, resume=True))
    assert (answer["policy_version"], answer["paused"]) == (-1, True)
    assert served.parameters["w"].startswith("float32[4, 6]:"), "it can still be said what differs"
    with pytest.raises(EngineError, match=r"of no version; publish one .*: .*version 4, which was published"):
        asyncio.run(served.resume(served.held))
    assert "resume" not in served.engine.calls
    asyncio.run(served.name(served.engine.held(4), pause=1))
    asyncio.run(served.resume(served.engine.held(4)))
    assert served.gate.is_open


@pytest.mark.parametrize("changes", [{"policy_version": 4}, {"digest": "0" * 64}], ids=["version", "digest"])
def test_it_is_not_resumed_as_what_it_is_not(served: Served, changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="this engine holds version 3 digest"):
        asyncio.run(served.resume(replace(served.held, **changes)))
    assert not served.gate.is_open


def test_weights_written_after_they_were_measured_are_not_sampled_from(served: Served) -> None:
    served.gate.freeze(served.gate.close())
    served.engine.models[0]["w"].data.add_(1)
    with pytest.raises(EngineError, match="have changed since they were named version 3"):
        asyncio.run(served.resume(served.held))
    assert not served.gate.is_open
