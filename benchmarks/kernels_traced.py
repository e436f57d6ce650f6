"""What a trace of torch's profiler says of the GPU: how much of the time it worked, and on what."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

NUM_KERNELS = 14


def summary(folder: Path) -> list[str]:
    """Of the newest trace there. Kernels' times add up; "busy" counts a moment once."""
    files = sorted(folder.glob("**/*.trace.json*"), key=lambda file: file.stat().st_mtime)
    if not files:
        return [f"no trace in {folder}"]
    opened = gzip.open if files[-1].suffix == ".gz" else open
    with opened(files[-1], "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return [f"{files[-1].name}: no kernels, {len(events)} events"]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - spans[0][0]
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in kernels:
        times[event["name"]].append(event["dur"])
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]
    lines = [f"\ntraced: {whole / 1e3:.0f} ms, the GPU busy for {100 * busy / whole:.0f} % of it; its kernels:"]
    for name, found in most:
        share, each = 100 * sum(found) / whole, sum(found) / len(found)
        lines.append(f"{share:6.1f} %  {len(found):>7} x {each:8.1f} us  {name[:90]}")
    return lines
