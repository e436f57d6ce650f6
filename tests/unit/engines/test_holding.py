"""What the scheduler holds back, what it never holds, and that nothing of it is lost, changed or late for a pause."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from syncline.engines.vllm.holding import HELD_TOKENS, Holding


class Scheduler:
    """As much of vLLM's as `Holding` sees: every step answers with a token for each request."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.pause_state = PauseState.UNPAUSED

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        del scheduler_output
        found: dict[int, EngineCoreOutputs] = {}
        for output in model_runner_output:
            client = self.requests[output.request_id].client_index
            found.setdefault(client, EngineCoreOutputs(outputs=[])).outputs.append(output)
            if output.finish_reason is not None:
                del self.requests[output.request_id]
        return found

    def has_requests(self) -> bool:
        return self.pause_state is not PauseState.PAUSED_ALL and bool(self.requests)

    def finish_requests(self, request_ids: list[str], finished_status: Any) -> list[Any]:
        del finished_status
        return [self.requests.pop(request_id) for request_id in request_ids]


class HoldingScheduler(Holding, Scheduler):
    def admit(self, request_id: str, *, client: int = 0, stop: tuple[str, ...] = (), **options: Any) -> None:
        kind = options.get("kind", RequestOutputKind.FINAL_ONLY)
        more = {"logprobs": options.get("logprobs", 0), "logprob_token_ids": options.get("logprob_token_ids")}
        asked = {"sampling_params": SimpleNamespace(output_kind=kind, stop=stop, **more), "client_index": client}
        resumable = options.get("resumable", False)
        self.requests[request_id] = SimpleNamespace(request_id=request_id, resumable=resumable, **asked)

    def step(self, *outputs: EngineCoreOutput) -> list[tuple[str, list[int]]]:
        """Request and tokens of each output that goes out."""
        self.sent = self.update_from_output(None, outputs)
        return [(o.request_id, o.new_token_ids) for each in self.sent.values() for o in each.outputs]


def one(request_id: str, token: int, *, others: int = 0, **more: Any) -> EngineCoreOutput:
    """`others`: logprobs beside the sampled token's, which another request of the step asked for."""
    row = [[token] * (1 + others)]
    logprobs = LogprobsLists(np.array(row), -np.array(row, np.float32) / 8, np.array([token + 1]))
    return EngineCoreOutput(request_id, [token], new_logprobs=logprobs, **more)


def first(request_id: str, token: int = 0) -> EngineCoreOutput:
    return one(request_id, token, prefill_stats=PrefillStats())


def test_tokens_travel_together_each_with_its_own_logprob_and_rank() -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a")
    assert scheduler.step(first("a")) == [("a", [0])], "the first token tells the server that the prompt is done"
    for token in range(1, HELD_TOKENS):
        assert scheduler.step(one("a", token)) == []
    assert scheduler.step(one("a", HELD_TOKENS)) == [("a", list(range(1, HELD_TOKENS + 1)))]
    for token in (70, 71):
        assert scheduler.step(one("a", token)) == []
    assert scheduler.step(one("a", 72, finish_reason=FinishReason.LENGTH)) == [("a", [70, 71, 72])]
    (last,) = scheduler.sent[0].outputs
    assert last.finish_reason is FinishReason.LENGTH
    assert last.new_logprobs is not None
    assert last.new_logprobs.logprob_token_ids.tolist() == [[70], [71], [72]]
    assert last.new_logprobs.logprobs.tolist() == [[-8.75], [-8.875], [-9.0]]
    assert last.new_logprobs.sampled_token_ranks.tolist() == [71, 72, 73]


def test_logprobs_that_another_request_of_the_step_asked_for_stay_behind() -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a")
    scheduler.step(first("a"))
    scheduler.step(one("a", 1))
    scheduler.step(one("a", 2, others=5))
    assert scheduler.step(one("a", 3, finish_reason=FinishReason.LENGTH)) == [("a", [1, 2, 3])]
    (last,) = scheduler.sent[0].outputs
    assert last.new_logprobs is not None
    assert last.new_logprobs.logprobs.tolist() == [[-0.125], [-0.25], [-0.375]]
    assert last.new_logprobs.logprob_token_ids.tolist() == [[1], [2], [3]]


def test_tokens_without_logprobs_travel_together_too() -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a")
    scheduler.step(first("a"))
    assert scheduler.step(EngineCoreOutput("a", [1])) == []
    assert scheduler.step(EngineCoreOutput("a", [2], finish_reason=FinishReason.STOP)) == [("a", [1, 2])]
    assert scheduler.sent[0].outputs[0].new_logprobs is None


@pytest.mark.parametrize(
    "options",
    [
        {"kind": RequestOutputKind.DELTA},
        {"kind": RequestOutputKind.CUMULATIVE},
        {"stop": ("\n",)},
        {"resumable": True},
        {"logprobs": 5},
        {"logprob_token_ids": [3]},
    ],
    ids=["streamed", "cumulative", "stop strings", "streamed in", "most likely tokens", "named tokens"],
)
def test_requests_whose_tokens_are_waited_for_are_not_held(options: dict[str, Any]) -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a", **options)
    scheduler.step(first("a"))
    assert scheduler.step(one("a", 1)) == [("a", [1])]


def test_what_more_than_tokens_comes_goes_out_behind_what_was_held() -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a")
    scheduler.step(first("a"))
    scheduler.step(one("a", 1))
    assert scheduler.step(one("a", 2, prefill_stats=PrefillStats())) == [("a", [1, 2])], "it was preempted in between"
    assert scheduler.sent[0].outputs[0].prefill_stats is not None


def test_a_paused_engine_holds_nothing_and_is_not_idle_before() -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a")
    scheduler.admit("b", client=1)
    scheduler.step(first("a"), first("b"))
    scheduler.step(one("a", 1), one("b", 11))
    scheduler.step(one("a", 2))
    scheduler.pause_state = PauseState.PAUSED_ALL
    assert scheduler.has_requests(), "a step must let go of what is held"
    assert scheduler.step(one("b", 12)) == [("b", [11, 12]), ("a", [1, 2])], "the last batch under way, and the others"
    assert [o.request_id for o in scheduler.sent[0].outputs] == ["a"], "to the client that asked"
    assert not scheduler.has_requests()
    scheduler.pause_state = PauseState.PAUSED_NEW
    assert scheduler.step(one("a", 3)) == [("a", [3])]
    scheduler.pause_state = PauseState.UNPAUSED
    assert scheduler.step(one("a", 4)) == []
    assert scheduler.has_requests()


def test_an_aborted_request_leaves_nothing_behind() -> None:
    scheduler = HoldingScheduler()
    scheduler.admit("a")
    scheduler.step(first("a"))
    scheduler.step(one("a", 1))
    scheduler.finish_requests(["a"], None)
    scheduler.pause_state = PauseState.PAUSED_ALL
    assert scheduler.step() == []
    assert not scheduler.has_requests()
