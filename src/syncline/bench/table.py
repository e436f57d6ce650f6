"""The tables `syncline bench` prints, and the same as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from syncline.bench.sync import FrozenKv, Result

HEAD = ("", "bytes", "p50 ms", "p99 ms", "GB/s", "pause p50", "pause p99", "decode during", "attach s")


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1))]


def sync_table(results: Sequence[Result], references: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """A block a shape: its bridges, then what they are compared with. Pauses are those that running requests saw."""
    lines: list[str] = []
    for shape in dict.fromkeys(result.shape for result in results):
        mine = [result for result in results if result.shape == shape]
        lines += ["", f"{shape}, {mine[0].weights_bytes / 1e9:.2f} GB of weights, {mine[0].engine}", _row(HEAD)]
        for result in mine:
            lines += [_busy_row(result, way) for way in result.busy] + _detail(result)
        for name, seconds in references.get(shape, {}).items():
            lines.append(_row((name, *_speed(mine[0].weights_bytes, seconds), "", "", "", "")))
    return lines


def as_json(results: Sequence[Result], references: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    return {"results": [asdict(result) for result in results], "references": references}


def _busy_row(result: Result, frozen_kv: FrozenKv) -> str:
    busy = result.busy[frozen_kv]
    name = result.bridge + (", KV reused" if frozen_kv == "reuse" else "")
    seconds = [report.seconds for report in busy.reports]
    pauses = [f"{1e3 * quantile(busy.pauses, share):.1f}" for share in (0.5, 0.99)]
    kept = f"{busy.decode:.0f} tok/s"
    return _row((name, *_speed(result.num_bytes, seconds), *pauses, kept, f"{result.attach:.2f}"))


def _detail(result: Result) -> list[str]:
    parts = {part: median([r.parts_seconds[part] for r in result.idle]) for part in result.idle[0].parts_seconds}
    told = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in parts.items())
    idle = [report.seconds for report in result.idle]
    idle_pauses = [report.pause_seconds for report in result.idle]
    lines = [
        f"    without requests: p50 {1e3 * median(idle):.1f} p99 {1e3 * quantile(idle, 0.99):.1f} ms ({told}), engine "
        f"paused p50 {1e3 * median(idle_pauses):.1f} p99 {1e3 * quantile(idle_pauses, 0.99):.1f} ms"
    ]
    if result.decode_shared:
        shared, unshared = median(result.decode_shared), median(result.decode_unshared)
        lines.append(
            f"    decode {shared:.0f} tok/s while shared, {unshared:.0f} of an engine that shares nothing, in turns "
            f"({shared / unshared:.3f} x)"
        )
    if result.engine_bytes is not None and result.learner_bytes is not None:
        lines.append(
            f"    device memory: engine {result.engine_bytes / 1e9:.2f} GB with its KV cache, learner "
            f"{result.learner_bytes / 1e9:.2f} GB of its own"
        )
    return lines


def _speed(num_bytes: int, seconds: Sequence[float]) -> tuple[str, ...]:
    p50 = median(seconds)
    speed = f"{num_bytes / 1e9 / p50:.1f}" if num_bytes else "-"
    return (f"{num_bytes / 1e6:.1f} MB", f"{1e3 * p50:.1f}", f"{1e3 * quantile(seconds, 0.99):.1f}", speed)


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>15}" for cell in cells[1:])
