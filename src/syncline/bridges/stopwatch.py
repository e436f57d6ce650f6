"""How long the parts of a sync took."""

import time


class Stopwatch:
    """Seconds of named parts, one after the other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def split(self, part: str, other: str, seconds: float) -> None:
        """`seconds` of `part` were spent on `other`, which may go on with its own lap."""
        self.parts[part] -= seconds
        self.parts[other] = self.parts.get(other, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.parts.values())
