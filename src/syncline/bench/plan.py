"""What one run of the sync benchmark takes: the engines that are there together, and what is measured on them in turn.

One engine serves every measurement that wants it: that of `restart` is also what `shared` is compared with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from syncline.bench.apart import Measure, tell
from syncline.bench.engine import Server, started
from syncline.bench.reference import Reference, copy_seconds, link, trl, trl_server
from syncline.bench.sync import BuildBridge, Case, Result, measure
from syncline.bridges.saved import model_class
from syncline.learner.model import learner_dtype

COPY, LINK, TRL = "plain copy", "link (NCCL broadcast)", "TRL server mode"
SPARE_BYTES = 6 << 30
"""Of an engine beside weights and cache: CUDA's context and graphs, and what the longest prompts take."""
LEARNER_COPIES = 3
"""Of the weights, on the learner's GPU: its own, and what a bridge or a reference holds for a while."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a shape's bridges are compared with. `case` is one of them, for its model and its GPUs."""

    label: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.case.shape} {self.label}"

    def prepare(self) -> Reference | None:
        """Its processes, which begin their imports; a plain copy has none."""
        case = self.case
        gpus = [gpu for gpu in (case.learner_gpu, case.engine_gpu) if gpu is not None]
        if self.label == LINK:
            return link(_learner_bytes(case), gpus=gpus, repeats=case.publishes)
        return trl(case.model, gpu=gpus[0], repeats=case.publishes) if self.label == TRL else None

    def measure(self, waiting: Reference | None, found: Path) -> dict[str, Any]:
        case, num_bytes = self.case, _learner_bytes(self.case)
        if waiting:
            url = started(found)[case.engine_name(TRL)].answering() if self.label == TRL else ""
            return {"num_bytes": num_bytes, "seconds": waiting.seconds(url)}
        device = torch.device("cpu") if case.learner_gpu is None else torch.device("cuda", case.learner_gpu)
        return {"num_bytes": num_bytes, "seconds": copy_seconds(num_bytes, device, case.publishes)}


def comparisons(cases: Sequence[Case], *, with_trl: bool) -> list[Comparison]:
    """Of each shape: between two GPUs the link and TRL, on one device a plain copy."""
    found: list[Comparison] = []
    for shape in dict.fromkeys(case.shape for case in cases):
        mine = [case for case in cases if case.shape == shape]
        far = next((case for case in mine if case.learner_gpu != case.engine_gpu), None)
        labels = [COPY] if far is None else [LINK, TRL] if with_trl else [LINK]
        found += [Comparison(label, far or mine[0]) for label in labels]
    return found


def measured(cases: Sequence[Case], *, with_trl: bool) -> list[str]:
    """The measurements' names, in their order."""
    return [one.name for one in [*cases, *comparisons(cases, with_trl=with_trl)]]


def engines(cases: Sequence[Case], *, with_trl: bool) -> dict[str, tuple[Case, str]]:
    """By the engine's name, a case that says how it is started, and its bridge."""
    found = {case.engine_name(bridge): (case, bridge) for case in cases for bridge in case.bridges}
    trls = [one.case for one in comparisons(cases, with_trl=with_trl) if one.label == TRL]
    return found | {case.engine_name(TRL): (case, TRL) for case in trls}


def start(case: Case, bridge: str) -> Server:
    if bridge != TRL:
        return case.serve(bridge)
    assert case.engine_gpu is not None, "TRL's mode is between GPUs"
    return trl_server(case.model, case.folder, gpu=case.engine_gpu, kv_cache_bytes=case.kv_cache_bytes)


def waves(cases: Sequence[Case], *, with_trl: bool, memory: Sequence[int]) -> list[list[Case]]:
    """Shapes whose engines are there at once: as many as fit on the GPUs, of which `memory` is free; one on a CPU."""
    found: list[list[Case]] = []
    for shape in dict.fromkeys(case.shape for case in cases):
        mine = [case for case in cases if case.shape == shape]
        needs = _needs([*found[-1], *mine], with_trl=with_trl) if found else {}
        if needs and all(need <= memory[gpu] for gpu, need in needs.items()):
            found[-1] += mine
        else:
            found.append(mine)
    return found


def measurements(
    cases: Sequence[Case], names: Sequence[str], *, build_bridge: BuildBridge, found: Path, told: Path, with_trl: bool
) -> Mapping[str, Measure]:
    """The child's: those of `names`. `found` tells of the engines, `told` is where it tells."""

    def bridge(case: Case) -> dict[str, Any]:
        there = started(found)
        mine = [there[case.engine_name(one)] for one in case.bridges]

        def so_far(result: Result) -> None:
            tell(told, {"name": case.name, "so_far": asdict(result)})

        return asdict(measure(case, build_bridge, mine, so_far))

    waiting = {one: one.prepare() for one in comparisons(cases, with_trl=with_trl) if one.name in names}
    for reference in filter(None, waiting.values()):
        reference.wait_until_imported()  # which would disturb what is measured
    compared = {one.name: partial(one.measure, reference, found) for one, reference in waiting.items()}
    return {case.name: partial(bridge, case) for case in cases} | compared


def _needs(cases: Sequence[Case], *, with_trl: bool) -> dict[int, int]:
    """Bytes by GPU; none on a CPU."""
    needs: dict[int, int] = {}
    for case, _ in engines(cases, with_trl=with_trl).values():
        if case.engine_gpu is not None:
            need = _stored_bytes(case.model) + case.kv_cache_bytes + SPARE_BYTES
            needs[case.engine_gpu] = needs.get(case.engine_gpu, 0) + need
    for gpu in {case.learner_gpu for case in cases if case.learner_gpu is not None}:
        needs[gpu] = needs.get(gpu, 0) + LEARNER_COPIES * max(_stored_bytes(case.model) for case in cases)
    return needs


def _stored_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _learner_bytes(case: Case) -> int:
    """Of the weights as the learner holds them."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(case.model)
    with torch.device("meta"):
        model = model_class(settings)._from_config(settings)
    dtype = learner_dtype("auto", torch.device("cpu" if case.learner_gpu is None else "cuda"))
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize
