"""`syncline bench sync`: what a publish costs, seen from the learner and from the requests that run meanwhile.

For each bridge a real engine is started, a learner's model attached, and every weight changed and published several
times while requests stream; then the same publishes again without requests. The references are measured in the same
run: the link (an NCCL broadcast of the same bytes between two GPUs, a plain copy on one), and TRL's server mode.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from syncline.bench.engine import serving
from syncline.bench.load import Load, running
from syncline.bench.reference import copy_seconds, link_seconds, trl_seconds
from syncline.config import RunConfig, resolve
from syncline.engines.client import EngineController
from syncline.learner.model import load_model
from syncline.protocols import EngineControl, SyncReport, WeightBridge

BuildBridge = Callable[[RunConfig, Sequence[EngineControl], Path], WeightBridge]
MAX_LENGTH = 2048
WARM_UP = 3
WARM_UP_SECONDS = 1.0
STEADY_SECONDS = 3.0
"""Of undisturbed requests, before the first publish."""
BETWEEN_SECONDS = 0.3
"""From one publish to the next while requests run."""


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
    gpu_memory_utilization: float = 0.4

    @property
    def sparse(self) -> bool:
        return self.bridge == "broadcast" and self.changed < 1

    def config(self) -> RunConfig:
        model: dict[str, Any] = {"path": str(self.model), "max_length": MAX_LENGTH}
        if self.lora_rank:
            model["lora"] = {"rank": self.lora_rank, "alpha": float(self.lora_rank)}
        engine: dict[str, Any] = {"kv_cache_bytes": 1 << 30, "gpu_memory_utilization": self.gpu_memory_utilization}
        learner: dict[str, Any] = {}
        if self.learner_gpu is not None:
            learner["devices"], engine["devices"] = [self.learner_gpu], [self.engine_gpu]
        return resolve(
            {
                "run": {"dir": str(self.folder / "run"), "num_steps": 1, "groups_per_step": 1},
                "model": model,
                "sampling": {"max_tokens": 16},
                "environments": [{"task": "arithmetic"}],
                "engine": engine,
                "learner": learner,
                "bridge": {"name": self.bridge, "in_flight": "keep", "sparse": self.sparse},
            }
        )


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
    busy: list[SyncReport] = field(default_factory=list)
    """Publishes while requests run."""
    pauses: list[float] = field(default_factory=list)
    """Of every stream at every publish: its longest wait for a token, less its usual one."""
    decode_before: float = 0.0
    """Tokens a second of the engine alone, before the learner attached."""
    decode_steady: float = 0.0
    """... with the learner attached, between publishes."""
    decode_during: float = 0.0
    """... over the time of the publishes."""
    weights_bytes: int = 0
    engine_bytes: int | None = None
    """Device memory the engine took; `None` on a CPU."""
    learner_bytes: int | None = None
    """Device memory this process holds for weights and bridge once attached."""


def measure(case: Case, build_bridge: BuildBridge) -> Result:
    """Starts the engine, attaches, publishes. Raises what the bridge raises."""
    config = case.config()
    free_before = _free(case.engine_gpu)
    gpus = [] if case.engine_gpu is None else [case.engine_gpu]
    with serving(config.model_dump(mode="json"), case.folder, name=f"{case.shape}-{case.bridge}", gpus=gpus) as engine:
        health = engine.health()
        name = f"{case.bridge} {case.changed:.2%} changed" if case.sparse else case.bridge
        result = Result(case.shape, name, f"{health['name']} {health['version']} on {health['device']}")
        engine_bytes = free_before - _free(case.engine_gpu)
        result.engine_bytes = engine_bytes if gpus else None
        with running(engine.url, case.num_requests) as load:
            time.sleep(WARM_UP_SECONDS)
            with _timed() as before:
                time.sleep(STEADY_SECONDS)
        result.decode_before = load.tokens_per_second(*before)
        _publishes(case, config, engine, result, build_bridge)
    return result


def _publishes(
    case: Case, config: RunConfig, engine: EngineController, result: Result, build_bridge: BuildBridge
) -> None:
    device = torch.device("cpu") if case.learner_gpu is None else torch.device("cuda", case.learner_gpu)
    model = load_model(config.model, device=device)
    result.weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    bridge = build_bridge(config, [engine], case.model)
    try:
        started = time.perf_counter()
        bridge.attach(model)
        result.attach = time.perf_counter() - started
        publish = _Publisher(bridge, model, device, every=round(1 / case.changed))
        for _ in range(WARM_UP):
            publish()
        result.idle = [publish() for _ in range(case.publishes)]
        result.num_bytes = result.idle[0].num_bytes
        windows: list[tuple[float, float]] = []
        with running(engine.url, case.num_requests) as load:
            time.sleep(WARM_UP_SECONDS)
            with _timed() as steady:
                time.sleep(STEADY_SECONDS)
            with _timed() as during:
                for _ in range(case.publishes):
                    with _timed() as window:
                        result.busy.append(publish())
                    windows.append((window[0], window[1]))
                    time.sleep(BETWEEN_SECONDS)
        _add_load(result, load, steady, during, windows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            result.learner_bytes = torch.cuda.memory_reserved(device)
    finally:
        bridge.close()


def _add_load(
    result: Result, load: Load, steady: list[float], during: list[float], windows: list[tuple[float, float]]
) -> None:
    result.decode_steady = load.tokens_per_second(*steady)
    result.decode_during = load.tokens_per_second(*during)
    result.pauses = [pause for window in windows for pause in load.pauses(*window)]


class _Publisher:
    """Changes what is trained, as a step does, one value in `every`, and publishes the next version."""

    def __init__(self, bridge: WeightBridge, model: Any, device: torch.device, *, every: int) -> None:
        self._bridge = bridge
        self._model = model
        self._device = device
        self._every = every
        self._version = -1

    def __call__(self) -> SyncReport:
        self._version += 1
        with self._bridge.updating():
            with torch.no_grad():
                for parameter in self._model.parameters():
                    if parameter.requires_grad:
                        parameter.view(-1)[:: self._every].neg_()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return self._bridge.publish(self._model, policy_version=self._version)


@contextmanager
def _timed() -> Iterator[list[float]]:
    """`[start, end]` of the block, on the clock of `load`."""
    span = [time.monotonic()]
    yield span
    span.append(time.monotonic())


def _free(gpu: int | None) -> int:
    return 0 if gpu is None else torch.cuda.mem_get_info(gpu)[0]


def references(case: Case, *, num_bytes: int, with_trl: bool) -> dict[str, list[float]]:
    """Seconds of the link, and of TRL's server mode where it can run."""
    if case.learner_gpu is None or case.learner_gpu == case.engine_gpu:
        device = torch.device("cpu") if case.learner_gpu is None else torch.device("cuda", case.learner_gpu)
        return {"plain copy": copy_seconds(num_bytes, device, case.publishes)}
    gpus = (case.learner_gpu, case.engine_gpu or 0)
    found = {"link (NCCL broadcast)": link_seconds(num_bytes, gpus=gpus, repeats=case.publishes)}
    trl = trl_seconds(case.model, gpus=gpus, repeats=case.publishes) if with_trl else None
    return found | ({"TRL server mode": trl} if trl is not None else {})
