"""What one run of the sync benchmark takes: the engines that are there together, and what is measured on them in turn.

One engine serves every measurement that wants it: that of `restart` is also what `shared` is compared with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from syncline.bench.apart import Measure, tell
from syncline.bench.engine import Server, started
from syncline.bench.reference import Reference, copy_seconds, link, trl, trl_server
from syncline.bench.sync import BuildBridge, Case, Result, measure

COPY, LINK, TRL = "plain copy", "link (NCCL broadcast)", "TRL server mode"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a shape's bridges are compared with. `case` is one of them, for its model and its GPUs."""

    label: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.case.shape} {self.label}"

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.case.model.glob("*.safetensors"))

    def prepare(self) -> Reference | None:
        """Its processes, which begin their imports; a plain copy has none."""
        case = self.case
        gpus = [gpu for gpu in (case.learner_gpu, case.engine_gpu) if gpu is not None]
        if self.label == LINK:
            return link(self.num_bytes, gpus=gpus, repeats=case.publishes)
        return trl(case.model, gpu=gpus[0], repeats=case.publishes) if self.label == TRL else None

    def measure(self, waiting: Reference | None, found: Path) -> dict[str, Any]:
        case = self.case
        if waiting:
            url = started(found)[case.engine_name(TRL)].answering() if self.label == TRL else ""
            return {"num_bytes": self.num_bytes, "seconds": waiting.seconds(url)}
        device = torch.device("cpu") if case.learner_gpu is None else torch.device("cuda", case.learner_gpu)
        return {"num_bytes": self.num_bytes, "seconds": copy_seconds(self.num_bytes, device, case.publishes)}


@dataclass(frozen=True, slots=True)
class Plan:
    cases: Sequence[Case]
    folder: Path
    with_trl: bool

    @property
    def found(self) -> Path:
        """Where the engines are told of."""
        return self.folder / "engines.json"

    @property
    def told(self) -> Path:
        """Where what is known of the measurements is told."""
        return self.folder / "told.jsonl"

    @property
    def comparisons(self) -> list[Comparison]:
        """Of each shape: between two GPUs the link and TRL, on one device a plain copy."""
        found: list[Comparison] = []
        for shape in dict.fromkeys(case.shape for case in self.cases):
            mine = [case for case in self.cases if case.shape == shape]
            far = next((case for case in mine if case.learner_gpu != case.engine_gpu), None)
            labels = [COPY] if far is None else [LINK, TRL] if self.with_trl else [LINK]
            found += [Comparison(label, far or mine[0]) for label in labels]
        return found

    @property
    def names(self) -> list[str]:
        """Of the measurements, in their order."""
        return [one.name for one in [*self.cases, *self.comparisons]]

    def engines(self) -> dict[str, Callable[[], Server]]:
        """By name, what starts each."""
        found = {case.engine_name(one): partial(case.serve, one) for case in self.cases for one in case.bridges}
        for case in (one.case for one in self.comparisons if one.label == TRL):
            gpu = case.engine_gpu or 0
            start = partial(trl_server, case.model, case.log(TRL), gpu=gpu, kv_cache_bytes=case.kv_cache_bytes)
            found[case.engine_name(TRL)] = start
        return found

    def measurements(self, names: Sequence[str], build_bridge: BuildBridge) -> Mapping[str, Measure]:
        """Those of `names`, for the process that takes them, which is told of the engines first."""
        waiting = {one: one.prepare() for one in self.comparisons if one.name in names}
        for reference in filter(None, waiting.values()):
            reference.wait_until_imported()  # which would disturb what is measured
        engines = started(self.found)

        def bridge(case: Case) -> dict[str, Any]:
            def so_far(result: Result) -> None:
                tell(self.told, {"name": case.name, "so_far": asdict(result)})

            return asdict(measure(case, build_bridge, [engines[case.engine_name(one)] for one in case.bridges], so_far))

        compared = {one.name: partial(one.measure, reference, self.found) for one, reference in waiting.items()}
        return {case.name: partial(bridge, case) for case in self.cases} | compared
