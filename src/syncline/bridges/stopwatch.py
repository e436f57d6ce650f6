"""How long the parts of a sync took."""

import time


class Stopwatch:
    """Seconds of named parts, one after the other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.parts.values())
