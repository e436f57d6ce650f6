"""How a collection goes, in one line: what is done, at what rate, how busy the engines are, when it will end.

Two measures of busy. Slots: completions in flight over those the engines run at once, known everywhere. GPU: the share
of time in which a kernel ran, as `nvidia-smi` tells, where there is one; a process of its own, read as it writes.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import fmean

from syncline.offline.sampler import Tally

GPU_MILLISECONDS = 200


@dataclass(slots=True)
class Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class Gauge:
    """`tick()` every so often adds a sample of the slots; `line()` tells. `done_before` was there when it began."""

    def __init__(
        self, tally: Tally, *, done_before: int, slots: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tally = tally
        self._done_before = done_before
        self._slots = slots
        self._clock = clock
        self._started = clock()
        self.slots_busy = Mean()
        """Of one engine, over the engines that are not lost."""
        self.gpu_busy = Mean()

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    def tick(self) -> None:
        """While nothing is queued any more the engines run empty, and that counts too."""
        running = [min(count, self._slots) for name, count in self._tally.running.items()]
        num_engines = max(1, len(self._tally.running.keys() - self._tally.lost.keys()))
        self.slots_busy.add(sum(running) / (num_engines * self._slots))

    def line(self) -> str:
        tally, seconds = self._tally, max(self.seconds, 1e-9)
        done, total = self._done_before + tally.done, self._done_before + tally.total
        left = (total - done) * seconds / tally.done if tally.done else None
        parts = [f"collected {done}/{total}", f"{tally.tokens / seconds:,.0f} tokens/s"]
        if self.slots_busy.value is not None:
            parts.append(f"slots {self.slots_busy.value:.0%}")
        if self.gpu_busy.value is not None:
            parts.append(f"GPU {self.gpu_busy.value:.0%}")
        parts.append(f"ETA {_clock_time(left)}")
        if tally.given_back:
            parts.append(f"{tally.given_back} sampled again")
        if tally.lost:
            parts.append(f"{len(tally.lost)} engines lost")
        return ", ".join(parts)


@asynccontextmanager
async def gauging(
    gauge: Gauge, show: Callable[[str], None], *, gpus: Sequence[str], tick_seconds: float = 0.5, show_seconds: float
) -> AsyncIterator[None]:
    """Ticks and shows while the body runs, and shows once more at its end."""
    tasks = [asyncio.create_task(_tick(gauge, show, tick_seconds, show_seconds))]
    if gpus and shutil.which("nvidia-smi"):
        tasks.append(asyncio.create_task(_watch_gpus(gauge, gpus)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        show(gauge.line())


async def _tick(gauge: Gauge, show: Callable[[str], None], tick_seconds: float, show_seconds: float) -> None:
    shown = gauge.seconds
    while True:
        await asyncio.sleep(tick_seconds)
        gauge.tick()
        if gauge.seconds - shown >= show_seconds:
            shown = gauge.seconds
            show(gauge.line())


async def _watch_gpus(gauge: Gauge, gpus: Sequence[str]) -> None:
    """The mean over the GPUs, one sample a line of each."""
    query = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"-lms={GPU_MILLISECONDS}")
    asked = ("nvidia-smi", "-i", ",".join(gpus), *query)
    process = await asyncio.create_subprocess_exec(*asked, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        row: list[float] = []
        async for line in process.stdout:
            row.append(float(line) / 100)
            if len(row) == len(gpus):
                gauge.gpu_busy.add(fmean(row))
                row = []
    finally:
        process.kill()
        await process.wait()


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
