"""`syncline bench sync`: what a publish costs, seen from the learner and from the requests that run meanwhile.

On each bridge's engine, which is there already and idle, a learner's model is attached, and every weight changed and
published several times without requests; then again while requests stream, once for each way to treat the keys and
values of those that were frozen. How fast an engine decodes whose weights are shared is compared with one that shares
none, in turns. `plan.py` says which engines there are and what they are compared with.

Of a learner of several ranks every one is here, and attaches and publishes. Who waits: the others, for rank 0, which
alone speaks to engines, streams the requests and looks at the clock. Who unblocks: its word before each publish.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from syncline.bench.case import Case, FrozenKv
from syncline.bench.engine import START_SECONDS, Started
from syncline.bench.load import MAX_TOKENS, Load, decode_in_turns, running
from syncline.bridges.ranks import Ranks
from syncline.config import RunConfig
from syncline.engines.client import EngineController
from syncline.learner.distributed import rank_device
from syncline.learner.model import load_model
from syncline.learner.places import local, place_of
from syncline.protocols import EngineControl, SyncReport, WeightBridge

BuildBridge = Callable[[RunConfig, Sequence[EngineControl], Path], WeightBridge]
"""Of this process's rank."""
WARM_UP = 3
WARM_UP_SECONDS = 1.0
STEADY_SECONDS = 2.0
"""Of undisturbed requests."""
TURNS = 12
"""Of each engine whose decoding is compared."""
BETWEEN_SECONDS = 0.3
"""From one publish to the next while requests run."""
ADAPTED_TOKENS, BETWEEN_ADAPTERS_SECONDS = 64, 1.0
"""The same where an adapter moves, and its requests' length: each ends under the adapter it began with, and the second
publish after it waits for that."""
LONG_SECONDS = 25.0
"""After which, of one kind, no publish is begun beyond the first `FEWEST`."""
FEWEST = 5


@dataclass(slots=True)
class Busy:
    """Publishes while requests run."""

    reports: list[SyncReport] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    """Of every watched request that ran at a publish: its longest wait for a token then, less the usual one."""
    decode: float = 0.0
    """Tokens a second of all requests over the time of the publishes."""
    tokens_a_piece: float = 0.0
    """Of the streams that are watched: above 1, the server could not follow them."""


@dataclass(slots=True)
class Result:
    """Seconds throughout; one entry a publish."""

    shape: str
    bridge: str
    engine: str
    tensor_parallel: int = 1
    """Ranks of the engine, and of a learner that shares its weights."""
    num_bytes: int = 0
    attach: float = 0.0
    idle: list[SyncReport] = field(default_factory=list)
    """Publishes while nothing runs."""
    busy: dict[FrozenKv, Busy] = field(default_factory=dict)
    decode_shared: list[float] = field(default_factory=list)
    """Tokens a second with the learner attached, after the publishes; one a turn. Measured for `shared` alone."""
    decode_unshared: list[float] = field(default_factory=list)
    """... of an engine beside it that shares nothing, in the turns just before or after."""
    weights_bytes: int = 0
    engine_bytes: int | None = None
    """Device memory the engine took; `None` on a CPU."""
    learner_bytes: int | None = None
    """Device memory the learner's ranks hold together for weights and bridge once attached."""


Tell = Callable[[Result], None]


def measure(case: Case, build_bridge: BuildBridge, engines: Sequence[Started], tell: Tell, *, ranks: Ranks) -> Result:
    """Attaches and publishes, on the engines of `case.bridges`; `tell` hears what is known meanwhile. All ranks of the
    learner come here; what rank 0 returns is the measurement. Raises what the bridge raises."""
    gc.collect()  # of the case before
    with closing(EngineController(engines[0].answering(), timeout_seconds=START_SECONDS)) as engine:
        result = _nothing_yet(case, engine, engines[0], ranks)
        device = rank_device(torch.device("cuda" if case.engine_gpus else "cpu"))
        model = load_model(case.config().model, device=device, ranks=ranks)
        publish = _Publisher(model, device, ranks, every=round(1 / case.changed))
        result.weights_bytes = sum(prod(place_of(p).shape) * p.element_size() for p in model.parameters())
        for frozen_kv in case.ways():
            bridge = build_bridge(case.config(frozen_kv), [engine], case.model)
            try:
                _publishes(case, engine, publish.over(bridge), result, frozen_kv, tell=tell)
            finally:
                bridge.close()
            tell(result)
        if engines[1:]:
            urls = [one.answering() for one in engines]
            ranks.from_first(lambda: _compare_decoding(urls, case.num_requests, result, tell))
    return result


def _nothing_yet(case: Case, engine: EngineController, started: Started, ranks: Ranks) -> Result:
    health = ranks.from_first(engine.health)
    name = f"{case.bridge} {case.changed:.2%} changed" if case.sparse else case.bridge
    cache = f"{case.kv_cache_bytes >> 20} MiB of KV cache{' a rank' if case.tensor_parallel > 1 else ''}"
    where = f"{health['name']} {health['version']} on {health['device']}, {cache}"
    return Result(case.shape, name, where, case.tensor_parallel, engine_bytes=started.gpu_bytes)


def _publishes(
    case: Case, engine: EngineController, publish: "_Publisher", result: Result, frozen_kv: FrozenKv, *, tell: Tell
) -> None:
    ranks, started = publish.ranks, time.perf_counter()
    publish.bridge.attach(publish.model)
    attached = time.perf_counter() - started
    for _ in range(WARM_UP):
        publish()
    if not result.busy:
        result.attach = attached
        for _ in _repeated(case.publishes, ranks):
            result.idle.append(publish())
            result.num_bytes = result.idle[0].num_bytes
            tell(result)
    result.busy[frozen_kv] = busy = Busy()
    windows: list[tuple[float, float]] = []
    max_tokens, between = (
        (ADAPTED_TOKENS, BETWEEN_ADAPTERS_SECONDS) if case.lora_rank else (MAX_TOKENS, BETWEEN_SECONDS)
    )
    streams = running(engine.url, case.num_requests, max_tokens=max_tokens) if ranks.is_first else nullcontext(Load())
    with streams as load:
        _sleep(WARM_UP_SECONDS + STEADY_SECONDS, ranks)
        with _timed() as during:
            for _ in _repeated(case.publishes, ranks):
                with _timed() as window:
                    busy.reports.append(publish())
                windows.append((window[0], window[1]))
                tell(result)
                _sleep(between, ranks)
    busy.decode, busy.tokens_a_piece = load.tokens_per_second(*during), load.tokens_a_piece()
    busy.pauses = [pause for window in windows for pause in load.pauses(*window)]
    if publish.device.type == "cuda":
        result.learner_bytes = sum(ranks.gathered(torch.cuda.memory_reserved(publish.device)))


def _compare_decoding(urls: Sequence[str], num_requests: int, result: Result, tell: Tell) -> None:
    for shared, unshared in decode_in_turns(urls, num_requests, turns=TURNS):
        result.decode_shared.append(shared)
        result.decode_unshared.append(unshared)
        tell(result)


class _Publisher:
    """Changes what is trained, as a step does, one value in `every`, and publishes the next version."""

    def __init__(self, model: Any, device: torch.device, ranks: Ranks, *, every: int) -> None:
        self.model = model
        self.device = device
        self.ranks = ranks
        self.bridge: WeightBridge
        self._every = every
        self._version = -1

    def over(self, bridge: WeightBridge) -> "_Publisher":
        self.bridge = bridge
        return self

    def __call__(self) -> SyncReport:
        self._version += 1
        with self.bridge.updating():
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        local(parameter).view(-1)[:: self._every].neg_()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return self.bridge.publish(self.model, policy_version=self._version)


def _repeated(publishes: int, ranks: Ranks) -> Iterator[int]:
    """As rank 0 says, whose clock counts."""
    until = time.monotonic() + LONG_SECONDS
    for i in range(publishes):
        if ranks.from_first(lambda: time.monotonic() < until) or i < FEWEST:
            yield i


def _sleep(seconds: float, ranks: Ranks) -> None:
    """Rank 0 does; the others wait for its next word."""
    if ranks.is_first:
        time.sleep(seconds)


@contextmanager
def _timed() -> Iterator[list[float]]:
    """`[start, end]` of the block, on the clock of `load`."""
    span = [time.monotonic()]
    yield span
    span.append(time.monotonic())
