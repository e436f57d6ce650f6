"""The learner waits for every engine at once, and names all that do not come up."""

from threading import Barrier

import pytest

from syncline.cli.bridge import await_servers
from syncline.config import resolve
from syncline.errors import EngineError, EngineTimeout

CONFIG = resolve(
    {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"start_timeout_seconds": 17.0, "device": "cpu"},
        "learner": {"device": "cpu"},
    }
)


class Coming:
    """An engine that is asked together with the others; `fault` is what comes of it."""

    def __init__(self, together: Barrier, fault: EngineError | None = None) -> None:
        self.together, self.fault, self.patience = together, fault, 0.0

    def wait_until_ready(self, *, timeout_seconds: float) -> None:
        self.patience = timeout_seconds
        self.together.wait(timeout=10)  # broken, were they asked in turn
        if self.fault:
            raise self.fault


def test_all_are_asked_at_once_and_get_the_time_of_a_start() -> None:
    together = Barrier(3)
    engines = [Coming(together) for _ in range(3)]
    await_servers(CONFIG, engines)  # type: ignore[arg-type]
    assert [engine.patience for engine in engines] == [17.0] * 3


def test_those_that_do_not_come_up_are_named_together_with_one_remedy() -> None:
    together = Barrier(3)
    late = EngineTimeout("http://a:1 was not ready after 17 s")
    engines = [Coming(together, late), Coming(together), Coming(together, EngineError("http://c:3 serves no policy"))]
    with pytest.raises(EngineTimeout) as told:
        await_servers(CONFIG, engines)  # type: ignore[arg-type]
    assert str(told.value).splitlines() == [
        "http://a:1 was not ready after 17 s",
        "http://c:3 serves no policy",
        "start it with `syncline serve`, or raise engine.start_timeout_seconds",
    ]
