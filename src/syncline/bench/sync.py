"""`syncline bench sync`: what a publish costs, seen from the learner and from the requests that run meanwhile.

On each bridge's engine, which is there already and idle, a learner's model is attached, and every weight changed and
published several times without requests; then again while requests stream, once for each way to treat the keys and
values of those that were frozen. How fast an engine decodes whose weights are shared is compared with one that shares
none, in turns. `plan.py` says which engines there are and what they are compared with.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from syncline.bench.engine import START_SECONDS, Server, Started, own_cache, serve
from syncline.bench.load import MAX_TOKENS, decode_in_turns, running
from syncline.config import RunConfig, resolve
from syncline.engines.client import EngineController
from syncline.learner.model import load_model
from syncline.protocols import EngineControl, SyncReport, WeightBridge

BuildBridge = Callable[[RunConfig, Sequence[EngineControl], Path], WeightBridge]
FrozenKv = Literal["recompute", "reuse"]
UNSHARED = "restart"
"""The bridge of the engine beside that of `shared`, which shares nothing."""
MAX_LENGTH = 2048
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


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. GPUs are counted from 0 among those this process shows; a CPU has none."""

    bridge: str
    model: Path
    shape: str
    folder: Path
    publishes: int = 20
    num_requests: int = 64
    lora_rank: int = 0
    changed: float = 1.0
    """Share of the values that each publish changes; below 1 `broadcast` sends these alone."""
    learner_gpu: int | None = None
    engine_gpu: int | None = None
    kv_cache_bytes: int = 1 << 30
    """Of each engine."""

    @property
    def name(self) -> str:
        return f"{self.shape} {self.bridge}"

    @property
    def bridges(self) -> tuple[str, ...]:
        """Of the engines that this case is measured on: its own, and the one it is compared with."""
        return (self.bridge, UNSHARED) if self.bridge == "shared" and not self.lora_rank else (self.bridge,)

    def engine_name(self, bridge: str) -> str:
        return f"{self.shape}-{bridge}"

    def log(self, bridge: str) -> Path:
        return self.folder / f"{self.engine_name(bridge)}.log"

    def serve(self, bridge: str) -> Server:
        """Starts one of its engines, whose settings differ in the bridge alone."""
        gpus = [] if self.engine_gpu is None else [self.engine_gpu]
        values, log = self.config(bridge=bridge).model_dump(mode="json"), self.log(bridge)
        return serve(values, log, gpus=gpus, VLLM_CACHE_ROOT=own_cache(log))

    @property
    def sparse(self) -> bool:
        return self.bridge == "broadcast" and self.changed < 1

    def ways(self) -> tuple[FrozenKv, ...]:
        """How frozen requests are treated, in turn; an adapter's never are, and beside a reload it is nothing."""
        return ("recompute",) if self.lora_rank or self.bridge == "restart" else ("recompute", "reuse")

    def config(self, frozen_kv: FrozenKv = "recompute", *, bridge: str | None = None) -> RunConfig:
        model: dict[str, Any] = {"path": str(self.model), "max_length": MAX_LENGTH}
        if self.lora_rank:
            model["lora"] = {"rank": self.lora_rank, "alpha": float(self.lora_rank)}
        engine: dict[str, Any] = {"kv_cache_bytes": self.kv_cache_bytes}
        learner: dict[str, Any] = {}
        kept = {"in_flight": "keep", "frozen_kv": frozen_kv}
        if self.learner_gpu is not None:
            learner["devices"], engine["devices"] = [self.learner_gpu], [self.engine_gpu]
            engine["gpu_memory_utilization"] = 0.05  # must be free at the start, whatever the cache's size
            engine["extra"] = {"kv_cache_memory_bytes": self.kv_cache_bytes}
        return resolve(
            {
                "run": {"dir": str(self.folder / "run"), "num_steps": 1, "groups_per_step": 1},
                "model": model,
                "sampling": {"max_tokens": 16},
                "environments": [{"task": "arithmetic"}],
                "engine": engine,
                "learner": learner,
                "bridge": {"name": bridge or self.bridge, "sparse": self.sparse and bridge in (None, self.bridge)}
                | ({} if self.lora_rank else kept),
            }
        )


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
    """Device memory this process holds for weights and bridge once attached."""


Tell = Callable[[Result], None]


def measure(case: Case, build_bridge: BuildBridge, engines: Sequence[Started], tell: Tell) -> Result:
    """Attaches and publishes, on the engines of `case.bridges`; `tell` hears what is known meanwhile. Raises what the
    bridge raises."""
    gc.collect()  # of the case before
    with closing(EngineController(engines[0].answering(), timeout_seconds=START_SECONDS)) as engine:
        health = engine.health()
        name = f"{case.bridge} {case.changed:.2%} changed" if case.sparse else case.bridge
        cache = f"{case.kv_cache_bytes >> 20} MiB of KV cache"
        where = f"{health['name']} {health['version']} on {health['device']}, {cache}"
        result = Result(case.shape, name, where, engine_bytes=engines[0].gpu_bytes)
        device = torch.device("cpu") if case.learner_gpu is None else torch.device("cuda", case.learner_gpu)
        model = load_model(case.config().model, device=device)
        publish = _Publisher(model, device, every=round(1 / case.changed))
        result.weights_bytes = sum(p.numel() * p.element_size() for p in publish.model.parameters())
        for frozen_kv in case.ways():
            bridge = build_bridge(case.config(frozen_kv), [engine], case.model)
            try:
                _publishes(case, engine, publish.over(bridge), result, frozen_kv, tell=tell)
            finally:
                bridge.close()
            tell(result)
        if engines[1:]:
            urls = [one.answering() for one in engines]
            for shared, unshared in decode_in_turns(urls, case.num_requests, turns=TURNS):
                result.decode_shared.append(shared)
                result.decode_unshared.append(unshared)
                tell(result)
    return result


def _publishes(
    case: Case, engine: EngineController, publish: "_Publisher", result: Result, frozen_kv: FrozenKv, *, tell: Tell
) -> None:
    started = time.perf_counter()
    publish.bridge.attach(publish.model)
    attached = time.perf_counter() - started
    for _ in range(WARM_UP):
        publish()
    if not result.busy:
        result.attach = attached
        for _ in _repeated(case.publishes):
            result.idle.append(publish())
            result.num_bytes = result.idle[0].num_bytes
            tell(result)
    result.busy[frozen_kv] = busy = Busy()
    windows: list[tuple[float, float]] = []
    max_tokens, between = (
        (ADAPTED_TOKENS, BETWEEN_ADAPTERS_SECONDS) if case.lora_rank else (MAX_TOKENS, BETWEEN_SECONDS)
    )
    with running(engine.url, case.num_requests, max_tokens=max_tokens) as load:
        time.sleep(WARM_UP_SECONDS + STEADY_SECONDS)
        with _timed() as during:
            for _ in _repeated(case.publishes):
                with _timed() as window:
                    busy.reports.append(publish())
                windows.append((window[0], window[1]))
                tell(result)
                time.sleep(between)
    busy.decode, busy.tokens_a_piece = load.tokens_per_second(*during), load.tokens_a_piece()
    busy.pauses = [pause for window in windows for pause in load.pauses(*window)]
    if publish.device.type == "cuda":
        result.learner_bytes = torch.cuda.memory_reserved(publish.device)


class _Publisher:
    """Changes what is trained, as a step does, one value in `every`, and publishes the next version."""

    def __init__(self, model: Any, device: torch.device, *, every: int) -> None:
        self.model = model
        self.device = device
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
                        parameter.view(-1)[:: self._every].neg_()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return self.bridge.publish(self.model, policy_version=self._version)


def _repeated(publishes: int) -> Iterator[int]:
    until = time.monotonic() + LONG_SECONDS
    for i in range(publishes):
        if i < FEWEST or time.monotonic() < until:
            yield i


@contextmanager
def _timed() -> Iterator[list[float]]:
    """`[start, end]` of the block, on the clock of `load`."""
    span = [time.monotonic()]
    yield span
    span.append(time.monotonic())
