"""What one run of the sync benchmark takes: the engines that are there together, and what is measured on them in turn.

One engine serves every measurement that wants it: that of `restart` is also what `shared` is compared with. Who
measures is as many processes as the learner has ranks, so those with equally many follow each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from syncline.bench.apart import Measure, tell
from syncline.bench.case import Case, at
from syncline.bench.engine import Server, started
from syncline.bench.reference import Reference, copy_seconds, link, trl, trl_server
from syncline.bench.sync import BuildBridge, Result, measure
from syncline.bridges.ranks import Ranks

COPY, LINK, TRL = "plain copy", "link (NCCL broadcast)", "TRL server mode"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a shape's bridges are compared with. `case` is one of them, for its model and its GPUs."""

    kind: str
    case: Case

    @property
    def label(self) -> str:
        return self.kind + ("" if self.kind == COPY else at(self.case.tensor_parallel))

    @property
    def name(self) -> str:
        return f"{self.case.shape} {self.label}"

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.case.model.glob("*.safetensors"))

    def prepare(self) -> Reference | None:
        """Its processes, which begin their imports; a plain copy has none."""
        case = self.case
        if self.kind == LINK:
            return link(self.num_bytes, gpus=(0, *case.engine_gpus), repeats=case.publishes)
        return trl(case.model, gpu=0, repeats=case.publishes) if self.kind == TRL else None

    def measure(self, waiting: Reference | None, found: Path) -> dict[str, Any]:
        case = self.case
        if waiting:
            url = started(found)[case.engine_name(TRL)].answering() if self.kind == TRL else ""
            return {"num_bytes": self.num_bytes, "seconds": waiting.seconds(url)}
        device = torch.device("cuda", 0) if case.engine_gpus else torch.device("cpu")
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
        """Of each shape: from the learner's GPU to each engine's, the link and TRL; on one device a plain copy."""
        found: list[Comparison] = []
        for shape in dict.fromkeys(case.shape for case in self.cases):
            mine = [case for case in self.cases if case.shape == shape]
            kinds = [LINK, TRL] if self.with_trl else [LINK]
            far = [Comparison(kind, case) for case in mine if case.is_apart for kind in kinds]
            found += far or [Comparison(COPY, mine[0])]
        return found

    @property
    def names(self) -> list[str]:
        """Of the measurements, in their order."""
        wanted = self._num_ranks()
        return sorted(wanted, key=wanted.__getitem__)

    def leading(self, names: Sequence[str]) -> tuple[int, list[str]]:
        """How many ranks measure the first of these, and those that they may take: up to one that wants another
        number."""
        wanted = self._num_ranks()
        number = wanted[names[0]]
        return number, list(takewhile(lambda name: wanted[name] == number, names))

    def _num_ranks(self) -> dict[str, int]:
        """Of each measurement's learner."""
        return {case.name: case.num_ranks for case in self.cases} | {one.name: 1 for one in self.comparisons}

    def engines(self) -> dict[str, Callable[[], Server]]:
        """By name, what starts each."""
        found = {case.engine_name(one): partial(case.serve, one) for case in self.cases for one in case.bridges}
        for case in (one.case for one in self.comparisons if one.kind == TRL):
            place = {"gpus": case.engine_gpus, "kv_cache_bytes": case.kv_cache_bytes}
            found[case.engine_name(TRL)] = partial(trl_server, case.model, case.log(TRL), **place)
        return found

    def measurements(self, names: Sequence[str], build_bridge: BuildBridge, *, ranks: Ranks) -> Mapping[str, Measure]:
        """Those of `names`, for a process that takes them as one of `ranks`, which is told of the engines first."""
        waiting = {one: one.prepare() for one in self.comparisons if one.name in names}
        for reference in filter(None, waiting.values()):
            reference.wait_until_imported()  # which would disturb what is measured
        engines = started(self.found)

        def bridge(case: Case) -> dict[str, Any]:
            def so_far(result: Result) -> None:
                if ranks.is_first:
                    tell(self.told, {"name": case.name, "so_far": asdict(result)})

            wanted = [engines[case.engine_name(one)] for one in case.bridges]
            return asdict(measure(case, build_bridge, wanted, so_far, ranks=ranks))

        compared = {one.name: partial(one.measure, reference, self.found) for one, reference in waiting.items()}
        return {case.name: partial(bridge, case) for case in self.cases} | compared
