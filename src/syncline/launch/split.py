"""GPUs between engines and learner: every split that fits, by the time of its step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from syncline.config.load import resolve
from syncline.config.schema import Recomputation, RunConfig
from syncline.config.servers import num_stages
from syncline.errors import ConfigError
from syncline.launch.estimate import (
    GPUS,
    EngineMemory,
    Part,
    engine_memory,
    learn_seconds,
    learner_parts,
    sample_seconds,
    sync_seconds,
    total,
)
from syncline.launch.shape import Shape

FILLED = 0.95
"""Of a GPU's memory, that a part may be estimated to fill."""


@dataclass(frozen=True, slots=True)
class Split:
    """So many engines of so many ranks, and the learner's GPUs. `shared` has all on the same ones."""

    bridge: str
    num_engines: int
    tensor_parallel: int
    num_stages: int
    """Of an engine's pipeline: `engine.extra.pipeline_parallel_size`."""
    learner_gpus: int
    utilisation: float
    """Of each of its GPUs, what an engine takes."""
    num_at_once: int
    """Sequences an engine samples at once."""
    learner: tuple[Part, ...]
    engine: EngineMemory
    sample: float
    learn: float
    sync: float
    overlaps: bool
    """Sampling goes on while the learner learns (`run.max_staleness` above 0)."""

    @property
    def engine_ranks(self) -> int:
        """GPUs of an engine."""
        return self.tensor_parallel * self.num_stages

    @property
    def step(self) -> float:
        both = max(self.sample, self.learn) if self.overlaps else self.sample + self.learn
        return both + self.sync

    def overrides(self) -> dict[str, Any]:
        """What the run is told: our field → value."""
        engines = list(range(self.num_engines * self.engine_ranks))
        first = 0 if self.bridge == "shared" else len(engines)
        return {
            "bridge.name": self.bridge,
            "engine.devices": engines,
            "engine.tensor_parallel_size": self.tensor_parallel,
            "engine.num_replicas": self.num_engines,
            "engine.gpu_memory_utilization": self.utilisation,
            "engine.max_num_seqs": self.num_at_once,
            "learner.devices": list(range(first, first + self.learner_gpus)),
            "learner.tensor_parallel_size": self.learner_gpus if self.bridge == "shared" else 1,
            "learner.data_parallel_size": 1 if self.bridge == "shared" else self.learner_gpus,
        }


def splits(config: RunConfig, shape: Shape, *, num_gpus: int, gpu: str) -> list[Split]:
    """Those that fit and that no rule speaks against, the fastest first."""
    found = [
        split
        for bridge, engines, ranks, learners in _candidates(config, shape, num_gpus)
        if (split := _split(config, shape, gpu, bridge, (engines, ranks, learners))) and _may_run(split, config)
    ]
    return sorted(found, key=lambda split: (split.step, split.engine_ranks))


def fastest_recomputation(config: RunConfig, shape: Shape, *, num_gpus: int, gpu: str) -> tuple[str, Split] | None:
    """The `learner.recomputation.what` whose best split has the shortest step; of equals what computes least again."""
    learner, best = config.learner, []
    for what in get_args(Recomputation.model_fields["what"].annotation):
        again = learner.model_copy(update={"recomputation": learner.recomputation.model_copy(update={"what": what})})
        found = splits(config.model_copy(update={"learner": again}), shape, num_gpus=num_gpus, gpu=gpu)
        best += [(what, split) for split in found[:1]]
    return min(best, key=lambda pair: pair[1].step, default=None)


def _may_run(split: Split, config: RunConfig) -> bool:
    values = config.model_dump(mode="json")
    for name, value in split.overrides().items():
        section, _, field = name.partition(".")
        values[section][field] = value
    try:
        resolve(values)
    except ConfigError:
        return False
    return True


def _candidates(config: RunConfig, shape: Shape, num_gpus: int) -> Iterator[tuple[str, int, int, int]]:
    """(bridge, engines, tensor-parallel ranks of each, GPUs of the learner)."""
    stages = num_stages(config)
    apart = "lora" if config.model.lora and not config.model.lora.dora else "broadcast"
    for ranks in (size for size in (1, 2, 4, 8) if size <= num_gpus and shape.query % size == 0):
        if ranks == num_gpus:
            yield "shared", 1, ranks, ranks
        for learners in range(1, num_gpus - ranks * stages + 1):
            if engines := (num_gpus - learners) // (ranks * stages):
                yield apart, engines, ranks, learners


def _split(config: RunConfig, shape: Shape, gpu: str, bridge: str, sizes: tuple[int, int, int]) -> Split | None:
    """`None` where the learner or one sequence does not fit."""
    engines, ranks, learners = sizes
    stages = num_stages(config)
    memory, rate, bandwidth = GPUS[gpu]
    parts = learner_parts(config, shape, num_gpus=learners, counts_weights=bridge != "shared")
    room = FILLED - total(parts) / memory
    share = math.floor(20 * (room if bridge == "shared" else FILLED)) / 20
    engine = engine_memory(config, shape, gpu_bytes=memory, num_ranks=ranks * stages, utilisation=share)
    if room < 0 or engine.num_sequences == 0:
        return None
    wanted = math.ceil(config.run.groups_per_step * config.run.rollouts_per_group / engines)
    # the stages of a pipeline take turns: a token reads every stage's weights, one after the other
    speed = {"bandwidth": bandwidth, "num_ranks": ranks, "num_engines": engines}
    return Split(
        bridge=bridge,
        num_engines=engines,
        tensor_parallel=ranks,
        num_stages=stages,
        learner_gpus=learners,
        utilisation=share,
        num_at_once=min(wanted, engine.num_sequences),
        learner=tuple(parts),
        engine=engine,
        sample=sample_seconds(config, shape, engine, **speed),
        learn=learn_seconds(config, shape, rate=rate, num_gpus=learners),
        sync=sync_seconds(config, shape, bridge),
        overlaps=config.run.max_staleness > 0 and bridge != "shared",
    )
