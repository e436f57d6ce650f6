"""What the sync benchmark makes of its readings, by hand-worked numbers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from rank_processes import on_ranks

from syncline.bench import sync
from syncline.bench.load import Arrivals, Load, arrivals, decode_in_turns, seen_until
from syncline.bench.sync import Busy, Result
from syncline.bench.table import quantile, sync_table
from syncline.bridges.ranks import Ranks
from syncline.errors import EngineError
from syncline.protocols import Receipt, SyncReport


def event(*token_ids: int, **choice: Any) -> bytes:
    """As vLLM streams it."""
    choices = [{"index": 0, "text": '"token_ids":[1,2,3]'} | choice | {"token_ids": token_ids}]
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": choices}, separators=(",", ":")).encode() + b"\n\n"


def steadily(*times: float) -> Arrivals:
    return [(at, 1) for at in times]


def test_an_event_counts_its_tokens_when_the_piece_that_ends_it_arrives() -> None:
    whole = event(7, 8, 9)
    pieces = [
        (1.0, event(5, prompt_token_ids=[20, 21, 22])),
        (2.0, event(6) + whole[:-6]),
        (3.0, whole[-6:] + event(finish_reason="length") + b"data: [DONE]\n\n"),
    ]
    assert arrivals(pieces) == [(1.0, 1), (2.0, 1), (3.0, 3)]


def test_a_pause_is_what_a_request_waited_beyond_the_usual() -> None:
    steady = steadily(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    paused = steadily(0.0, 0.1, 0.2, 0.6, 0.7, 0.8)
    load = Load([steady, paused])
    assert load.pauses(0.25, 0.35) == pytest.approx([0.0, 0.3])
    assert load.pauses(0.61, 0.69) == pytest.approx([0.0, 0.0])


def test_what_lies_between_the_end_of_a_request_and_the_next_ones_first_token_is_no_pause() -> None:
    ended, next_one = steadily(0.0, 0.1, 0.2), steadily(0.9, 1.0, 1.1)
    other = steadily(0.0, 0.1, 0.2, 0.35, 0.45, 0.9, 1.0)
    load = Load([ended, next_one, other])
    assert load.pauses(0.25, 0.3) == pytest.approx([0.05])
    assert load.pauses(0.5, 0.6) == pytest.approx([0.35])
    assert load.pauses(0.15, 0.3) == pytest.approx([0.0, 0.05]), "its own last wait is one that it saw"


def test_a_stream_without_another_token_was_paused_to_the_end() -> None:
    stream = [[(0.0, event(5)), (0.1, event(6))], [(0.3, event(5)), (0.4, event(6)), (0.5, event(7))]]
    load = Load(seen_until(2.0, [stream]))
    assert load.pauses(1.0, 1.5) == pytest.approx([1.4])
    assert load.pauses(0.15, 0.2) == [], "then none was running"


def test_decode_speed_counts_the_tokens_of_the_window() -> None:
    watched = [[(0.0, 9), (1.0, 2), (1.9, 1), (2.0, 9)], [(1.5, 4)]]
    assert Load(watched).tokens_per_second(1.0, 2.0) == 7.0
    assert Load(watched, share=0.25).tokens_per_second(1.0, 3.0) == 32.0, "all requests', of which a fourth is watched"
    assert Load([[(0.0, 1), (1.0, 2), (2.0, 0)]]).tokens_a_piece() == 1.5


class Engine:
    """Answers `/generate` at its speed; the first turn is ten times as slow."""

    def __init__(self, tokens_per_second: float, *, finish_reason: str = "length") -> None:
        self.asked: list[int] = []
        self._speed = tokens_per_second
        self._finish_reason = finish_reason

    def answer(self, clock: "Clock", asked: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(asked["max_tokens"])
        num_tokens = asked["n"] * asked["max_tokens"]
        clock.now += num_tokens / self._speed * (10 if len(self.asked) == 1 else 1)
        return {"finish_reasons": [self._finish_reason] * asked["n"]}


@dataclass
class Clock:
    now: float = 0.0


@pytest.fixture
def take_turns(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[float]], list[str]]]:
    def taken(engines: dict[str, Engine], *, turns: int) -> tuple[list[list[float]], list[str]]:
        clock, order = Clock(), list[str]()

        def post(url: str, *, json: dict[str, Any], **_: Any) -> httpx.Response:
            order.append(url.removesuffix("/generate"))
            answer = engines[order[-1]].answer(clock, json)
            return httpx.Response(200, json=answer, request=httpx.Request("POST", f"http://{url}"))

        monkeypatch.setattr("syncline.bench.load.httpx.post", post)
        monkeypatch.setattr("syncline.bench.load.time", SimpleNamespace(monotonic=lambda: clock.now))
        return list(decode_in_turns(list(engines), 8, turns=turns)), order

    return taken


def test_turns_are_of_one_length_and_alternate_and_leave_the_first_out(take_turns: Any) -> None:
    engines = {"a": Engine(1600.0), "b": Engine(3200.0)}
    speeds, order = take_turns(engines, turns=3)
    assert speeds == [pytest.approx([1600.0, 3200.0])] * 3
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert engines["a"].asked == engines["b"].asked == [32, 40, 40, 40], "2 s of the slower one's 160 tok/s, 8 requests"


def test_a_slow_engine_has_fewer_turns(take_turns: Any) -> None:
    speeds, _ = take_turns({"a": Engine(64.0), "b": Engine(64.0)}, turns=20)
    assert len(speeds) == 1, "warming up took 80 s, so this is all there is time for"


def test_an_engine_that_ends_a_completion_early_is_not_measured(take_turns: Any) -> None:
    with pytest.raises(EngineError, match=r"^a ended completions of a fixed length by \['abort'\]"):
        take_turns({"a": Engine(100.0, finish_reason="abort"), "b": Engine(100.0)}, turns=1)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.99, 10), (1.0, 10), (0.1, 1)])
def test_quantile(share: float, expected: int) -> None:
    assert quantile([3, 1, 2, 5, 4, 6, 9, 10, 8, 7], share) == expected


def test_the_table_has_a_line_for_each_bridge_and_each_reference() -> None:
    report = SyncReport(Receipt(1, "d"), 2_000_000_000, 0.010, 0.004, {"digest": 0.001, "send": 0.009})
    result = Result("small", "broadcast", "vllm 0 on x", 2, num_bytes=2_000_000_000, weights_bytes=2_100_000_000)
    result.idle, result.busy = [report], {"recompute": Busy([report], [0.005]), "reuse": Busy([report], [0.003])}
    result.decode_shared, result.decode_unshared = [99.0, 99.0, 50.0], [100.0, 200.0, 100.0]
    lines = "\n".join(sync_table([result], {"small": {"link": {"num_bytes": 2_100_000_000, "seconds": [0.005]}}}, {}))
    assert "200.0" in lines, "2 GB in 10 ms are 200 GB/s"
    assert "420.0" in lines, "the link's, which carries all weights whatever the bridge sends"
    assert "digest 1.0, send 9.0" in lines
    assert "broadcast, TP 2, KV reused" in lines
    assert "decode 99 tok/s while shared, 100 of an engine that shares nothing: 0.500 x, 0.495 to 0.990 in 3 " in lines


def test_what_is_known_of_a_bridge_that_was_broken_off_has_its_row() -> None:
    """Of one, publishes without requests; of another, some while requests ran; of a third, that it had its engine."""
    report = SyncReport(Receipt(1, "d"), 2_000_000_000, 0.010, 0.004, {"digest": 0.001})
    idle = Result("small", "lora", "vllm 0 on x", num_bytes=2_000_000_000, idle=[report])
    busy = Result("small", "shared", "vllm 0 on x", idle=[report], busy={"recompute": Busy([report]), "reuse": Busy()})
    busy.decode_shared = [99.0]
    nothing = Result("small", "restart", "vllm 0 on x")
    lines = sync_table(
        [idle, busy, nothing], {"other": {"link": {"num_bytes": 1, "seconds": [1.0]}}}, {"small lora": "why"}
    )
    [row] = [line.split() for line in lines if line.startswith("lora")]
    assert row == ["lora,", "no", "requests", "2000.0", "MB", "10.0", "10.0", "200.0"]
    [row] = [line.split() for line in lines if line.startswith("shared")]
    assert row == ["shared", "0.0", "MB", "10.0", "10.0", "-", "-", "-", "-", "0.00"]
    assert len([line for line in lines if "without requests" in line]) == 2
    assert not [line for line in lines if "restart" in line or "decode 99" in line]
    assert any(line.startswith("link") for line in lines) and lines[-1] == "small lora: why"


def repeated(ranks: Ranks) -> list[int]:
    """To the second rank's own clock there is no time left, to the first one's there is."""
    sync.LONG_SECONDS = 60.0 if ranks.is_first else -1.0
    return list(sync._repeated(8, ranks))


def test_ranks_publish_as_often_as_the_first_has_time_for() -> None:
    assert on_ranks(repeated) == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
