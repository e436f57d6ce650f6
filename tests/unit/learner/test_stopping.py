"""A signal stops the learner where it waits, and nowhere else."""

import os
import signal

import pytest

from syncline.learner.stopping import Stopped, StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_loop_waits_stops_it_there(number: int, code: int) -> None:
    with (
        StopRequest().listening() as stop,
        pytest.raises(Stopped, match=signal.Signals(number).name) as told,
        stop.here(),
    ):
        os.kill(os.getpid(), number)
        signal.pause()
    assert told.value.exit_code == code


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end() -> None:
    done = []
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the step")
        with pytest.raises(Stopped), stop.here():
            done.append("another batch")
    assert done == ["the step"]


def test_afterwards_signals_are_what_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
