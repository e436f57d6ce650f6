"""The tables `syncline bench` prints, and the same as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from syncline.bench.case import at
from syncline.bench.sync import Result

HEAD = ("", "bytes", "p50 ms", "p99 ms", "GB/s", "pause p50", "pause p99", "decode during", "attach s")
ABSENT = ("", "", "", "")
"""Of a row without requests."""


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1))]


References = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Of each shape, by what it is compared with: `num_bytes` and `seconds`."""


def sync_table(results: Sequence[Result], references: References, left_out: Mapping[str, str]) -> list[str]:
    """A block a shape: its bridges, then what they are compared with; at the end, what is not or not wholly there, and
    why. Pauses are those that running requests saw."""
    lines: list[str] = []
    for shape in dict.fromkeys([*(result.shape for result in results), *references]):
        mine = [result for result in results if result.shape == shape]
        told = f"{mine[0].weights_bytes / 1e9:.2f} GB of weights, {mine[0].engine}" if mine else "no bridge"
        lines += ["", f"{shape}, {told}", _row(HEAD)]
        for result in mine:
            lines += _rows(result) + _detail(result)
        for name, found in references.get(shape, {}).items():
            lines.append(_row((name, *_speed(found["num_bytes"], found["seconds"]), *ABSENT)))
    return [*lines, "", *(f"{name}: {why}" for name, why in left_out.items())] if left_out else lines


def as_json(results: Sequence[Result], references: References, left_out: Mapping[str, str]) -> dict[str, Any]:
    return {"results": [asdict(result) for result in results], "references": references, "left_out": left_out}


def _rows(result: Result) -> list[str]:
    """One for each way that publishes were measured while requests ran; else what is known of the others."""
    rows: list[str] = []
    for frozen_kv, busy in result.busy.items():
        name = _name(result) + (", KV reused" if frozen_kv == "reuse" else "")
        pauses = [f"{1e3 * quantile(busy.pauses, share):.1f}" for share in (0.5, 0.99)] if busy.pauses else ["-", "-"]
        seen = (*pauses, f"{busy.decode:.0f} tok/s" if busy.decode else "-", f"{result.attach:.2f}")
        if seconds := [report.seconds for report in busy.reports]:
            rows.append(_row((name, *_speed(result.num_bytes, seconds), *seen)))
    if not rows and result.idle:
        seconds = [report.seconds for report in result.idle]
        rows.append(_row((f"{_name(result)}, no requests", *_speed(result.num_bytes, seconds), *ABSENT)))
    return rows


def _name(result: Result) -> str:
    return result.bridge + at(result.tensor_parallel)


def _detail(result: Result) -> list[str]:
    lines: list[str] = []
    if idle := [report.seconds for report in result.idle]:
        parts = {part: median([r.parts_seconds[part] for r in result.idle]) for part in result.idle[0].parts_seconds}
        told = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in parts.items())
        pauses = [report.pause_seconds for report in result.idle]
        lines.append(
            f"    without requests: p50 {1e3 * median(idle):.1f} p99 {1e3 * quantile(idle, 0.99):.1f} ms ({told}), "
            f"engine paused p50 {1e3 * median(pauses):.1f} p99 {1e3 * quantile(pauses, 0.99):.1f} ms"
        )
    if result.decode_shared and result.decode_unshared:
        shared, unshared = median(result.decode_shared), median(result.decode_unshared)
        times = [mine / other for mine, other in zip(result.decode_shared, result.decode_unshared, strict=True)]
        lines.append(
            f"    decode {shared:.0f} tok/s while shared, {unshared:.0f} of an engine that shares nothing: "
            f"{median(times):.3f} x, {min(times):.3f} to {max(times):.3f} in {len(times)} pairs of turns"
        )
    held = {"engine": result.engine_bytes, "learner": result.learner_bytes}
    if known := [f"{name} {num_bytes / 1e9:.2f} GB" for name, num_bytes in held.items() if num_bytes is not None]:
        lines.append(f"    device memory: {', '.join(known)}; the engine's with its KV cache")
    return lines


def _speed(num_bytes: int, seconds: Sequence[float]) -> tuple[str, ...]:
    p50 = median(seconds)
    speed = f"{num_bytes / 1e9 / p50:.1f}" if num_bytes else "-"
    return (f"{num_bytes / 1e6:.1f} MB", f"{1e3 * p50:.1f}", f"{1e3 * quantile(seconds, 0.99):.1f}", speed)


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<30}" + "".join(f"{cell:>15}" for cell in cells[1:])
