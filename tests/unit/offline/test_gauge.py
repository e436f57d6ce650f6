"""The progress line, on a clock of the test's own."""

from syncline.offline.gauge import Gauge
from syncline.offline.sampler import Tally


def test_line_tells_rate_slots_and_what_is_left() -> None:
    now = [100.0]
    tally = Tally(total=300)
    gauge = Gauge(tally, done_before=100, slots=8, clock=lambda: now[0])
    assert gauge.line() == "collected 100/400, 0 tokens/s, ETA unknown"
    tally.running.update(a=16, b=4)
    gauge.tick()
    tally.running.subtract(a=16, b=4)
    gauge.tick()
    now[0], tally.done, tally.tokens = 150.0, 100, 12_000
    gauge.gpu_busy.add(0.9)
    gauge.gpu_busy.add(1.0)
    assert gauge.line() == "collected 200/400, 240 tokens/s, slots 38%, GPU 95%, ETA 1:40"


def test_a_lost_engine_has_no_slots() -> None:
    tally = Tally(total=10, lost={"b": "gone"}, given_back=3)
    tally.running.update(a=4, b=0)
    gauge = Gauge(tally, done_before=0, slots=8, clock=lambda: 0.0)
    gauge.tick()
    assert gauge.line().endswith("slots 50%, ETA unknown, 3 sampled again, 1 engines lost")


def test_an_engine_lost_before_it_ran_takes_no_other_ones_slots() -> None:
    tally = Tally(total=10, lost={"never": "nobody listens"})
    tally.running.update(a=4, b=4)
    gauge = Gauge(tally, done_before=0, slots=8, clock=lambda: 0.0)
    gauge.tick()
    assert gauge.slots_busy.value == 0.5
