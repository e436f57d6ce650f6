"""One measurement of the sync benchmark: which bridge, model and devices, and the engines that it wants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from syncline.bench.engine import Server, own_cache, serve
from syncline.config import RunConfig, resolve

FrozenKv = Literal["recompute", "reuse"]
UNSHARED = "restart"
"""The bridge of the engine beside that of `shared`, which shares nothing."""
MAX_LENGTH = 2048


def at(tensor_parallel: int) -> str:
    """What a name says of it: nothing of 1."""
    return f", TP {tensor_parallel}" if tensor_parallel > 1 else ""


@dataclass(frozen=True, slots=True)
class Case:
    """GPUs are counted from 0 among those this process shows; the learner's first one is 0."""

    bridge: str
    model: Path
    shape: str
    folder: Path
    publishes: int = 20
    num_requests: int = 64
    lora_rank: int = 0
    changed: float = 1.0
    """Share of the values that each publish changes; below 1 `broadcast` sends these alone."""
    tensor_parallel: int = 1
    """Ranks of each engine."""
    engine_gpus: tuple[int, ...] = ()
    """One a rank; none: the CPU, learner included."""
    kv_cache_bytes: int = 1 << 30
    """Of each rank of an engine."""

    @property
    def name(self) -> str:
        return f"{self.shape} {self.bridge}{at(self.tensor_parallel)}"

    @property
    def bridges(self) -> tuple[str, ...]:
        """Of the engines that this case is measured on: its own, and the one it is compared with."""
        return (self.bridge, UNSHARED) if self.bridge == "shared" and not self.lora_rank else (self.bridge,)

    @property
    def num_ranks(self) -> int:
        """Of the learner, whose ranks are the processes that measure."""
        return self._num_ranks(self.bridge)

    def _num_ranks(self, bridge: str) -> int:
        """As many as the engine's where each trains the memory of one of those."""
        return self.tensor_parallel if bridge == "shared" and not self.lora_rank else 1

    @property
    def is_apart(self) -> bool:
        """The engine is on other GPUs than the learner."""
        return bool(self.engine_gpus) and 0 not in self.engine_gpus

    def engine_name(self, bridge: str) -> str:
        size = f"-tp{self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"{self.shape}-{bridge}{size}"

    def log(self, bridge: str) -> Path:
        return self.folder / f"{self.engine_name(bridge)}.log"

    def serve(self, bridge: str) -> Server:
        """Starts one of its engines, whose settings differ in the bridge alone."""
        values, log = self.config(bridge=bridge).model_dump(mode="json"), self.log(bridge)
        return serve(values, log, gpus=self.engine_gpus, VLLM_CACHE_ROOT=own_cache(log))

    @property
    def sparse(self) -> bool:
        return self.bridge == "broadcast" and self.changed < 1

    def ways(self) -> tuple[FrozenKv, ...]:
        """How frozen requests are treated, in turn; an adapter's never are, and beside a reload it is nothing."""
        return ("recompute",) if self.lora_rank or self.bridge == "restart" else ("recompute", "reuse")

    def config(self, frozen_kv: FrozenKv = "recompute", *, bridge: str | None = None) -> RunConfig:
        bridge = bridge or self.bridge
        model: dict[str, Any] = {"path": str(self.model), "max_length": MAX_LENGTH}
        if self.lora_rank:
            model["lora"] = {"rank": self.lora_rank, "alpha": float(self.lora_rank)}
        num_ranks, kept = self._num_ranks(bridge), {"in_flight": "keep", "frozen_kv": frozen_kv}
        learner = {"tensor_parallel_size": num_ranks, "devices": list(range(num_ranks))}
        engine: dict[str, Any] = {
            "tensor_parallel_size": self.tensor_parallel,
            "devices": list(self.engine_gpus or range(self.tensor_parallel)),  # a CPU ignores them
            "kv_cache_bytes": self.kv_cache_bytes,
        }
        if self.engine_gpus:
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
                "bridge": {"name": bridge, "sparse": self.sparse and bridge == self.bridge}
                | ({} if self.lora_rank else kept),
            }
        )
