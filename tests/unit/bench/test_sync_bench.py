"""What the sync benchmark makes of its readings, by hand-worked numbers."""

import pytest

from syncline.bench.load import Load
from syncline.bench.sync import Busy, Result
from syncline.bench.table import quantile, sync_table
from syncline.protocols import Receipt, SyncReport


def test_a_pause_is_what_a_stream_waited_beyond_its_usual() -> None:
    steady = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    paused = [0.0, 0.1, 0.2, 0.6, 0.7, 0.8]
    load = Load([steady, paused])
    assert load.pauses(0.25, 0.35) == pytest.approx([0.0, 0.3])
    assert load.pauses(0.61, 0.69) == pytest.approx([0.0, 0.0])


def test_a_stream_without_a_token_was_paused_all_the_time() -> None:
    assert Load([[0.0]]).pauses(1.0, 1.5) == [0.5]


def test_decode_speed_counts_the_tokens_of_the_window() -> None:
    assert Load([[0.0, 1.0, 1.9, 2.0], [1.5]]).tokens_per_second(1.0, 2.0) == 3.0


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.99, 10), (1.0, 10), (0.1, 1)])
def test_quantile(share: float, expected: int) -> None:
    assert quantile([3, 1, 2, 5, 4, 6, 9, 10, 8, 7], share) == expected


def test_the_table_has_a_line_for_each_bridge_and_each_reference() -> None:
    report = SyncReport(Receipt(1, "d"), 2_000_000_000, 0.010, 0.004, {"digest": 0.001, "send": 0.009})
    result = Result("small", "broadcast", "vllm 0 on x", num_bytes=2_000_000_000, weights_bytes=2_100_000_000)
    result.idle, result.busy = [report], {"recompute": Busy([report], [0.005]), "reuse": Busy([report], [0.003])}
    result.decode_shared, result.decode_unshared = [99.0, 99.0, 50.0], [100.0, 200.0, 100.0]
    lines = "\n".join(sync_table([result], {"small": {"link": {"num_bytes": 2_100_000_000, "seconds": [0.005]}}}, {}))
    assert "200.0" in lines, "2 GB in 10 ms are 200 GB/s"
    assert "420.0" in lines, "the link's, which carries all weights whatever the bridge sends"
    assert "digest 1.0, send 9.0" in lines
    assert "broadcast, KV reused" in lines
    assert "(0.990 x)" in lines, "the medians of the turns"


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
