"""A learner of several ranks to a real vLLM of another number of them: one sends, what arrives is the whole model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rank_processes import on_ranks
from real_engine import make_tiny_model, run_values, running_engine
from test_shared_ranks import plain_model, whole_weights
from test_weight_bridge import DEVICE, TOLERANCE, Side

from syncline.bridges.ranks import Ranks
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.cli.bridge import build_bridge
from syncline.config import resolve
from syncline.engines.client import EngineController
from syncline.learner.distributed import rank_device
from syncline.learner.model import checkpoint_shards, load_model

pytestmark = pytest.mark.e2e
NUM_STEPS = 2
BRIDGES = ({"name": "restart"}, {"name": "broadcast", "sparse": True, "bucket_bytes": 200_000})


class Place(NamedTuple):
    """A learner of `learner` ranks and an engine of `engine`, each rank on a GPU of its own where there are GPUs."""

    learner: int
    engine: int

    def values(self, model: Path, folder: Path, bridge: dict[str, Any]) -> dict[str, Any]:
        gpus = list(range(self.learner + self.engine))
        values = run_values(model, folder / "run", bridge=bridge)
        values["engine"] |= {"device": DEVICE, "tensor_parallel_size": self.engine, "devices": gpus[self.learner :]}
        values["learner"] = {"device": DEVICE, "tensor_parallel_size": self.learner, "devices": gpus[: self.learner]}
        return values


def _places() -> list[Any]:
    return [
        pytest.param(
            place,
            id=f"{place.learner}-to-{place.engine}",
            marks=pytest.mark.skipif(0 < torch.cuda.device_count() < sum(place), reason=f"needs {sum(place)} GPUs"),
        )
        for place in (Place(2, 1), Place(4, 2))
    ]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=_places())
def place(request) -> Place:
    return request.param


@pytest.fixture(scope="module")
def engine(place: Place, model_path: Path, tmp_path_factory) -> Iterator[EngineController]:
    folder = tmp_path_factory.mktemp("engine")
    with running_engine(place.values(model_path, folder, {"name": "broadcast"}), folder) as controller:
        yield controller


def published_over_each(ranks: Ranks, url: str, bridges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [published(ranks, url, values) for values in bridges]


def published(ranks: Ranks, url: str, values: dict[str, Any]) -> dict[str, Any]:
    """Versions of which each changes a tenth of the values, and what the last one's whole weights are."""
    config = resolve(values)
    control = EngineController(url, timeout_seconds=60)
    model = load_model(config.model, device=rank_device(torch.device(DEVICE)), ranks=ranks)
    bridge = build_bridge(config, [control], Path(config.model.path), ranks=ranks)
    bridge.attach(model)
    first = ranks.from_first(lambda: control.receipt().policy_version) + 1
    reports = [bridge.publish(model, policy_version=first)]
    for version in range(first + 1, first + 1 + NUM_STEPS):
        with bridge.updating():
            nudge(model, version)
            reports.append(bridge.publish(model, policy_version=version))
    bridge.close()
    control.close()
    return {"reports": reports, "weights": whole_weights(model, ranks)}


def nudge(model: Any, version: int) -> None:
    """Copies of a piece move alike on all ranks, pieces each in their own way."""
    for index, (_, shard) in enumerate(checkpoint_shards(model)):
        generator = torch.Generator().manual_seed(10_000 * version + 100 * sum(shard.start) + index)
        noise = 0.3 * torch.randn(shard.tensor.shape, generator=generator)
        chosen = torch.rand(shard.tensor.shape, generator=generator) < 0.1
        shard.tensor.data.add_((noise * chosen).to(shard.tensor))


def test_the_engine_holds_and_samples_from_the_whole_of_what_all_ranks_trained(
    place: Place, engine: EngineController, model_path: Path, tmp_path: Path
) -> None:
    """Files first; then, from the first weights again, everything once and after that what changed."""
    values = [place.values(model_path, tmp_path, bridge) for bridge in BRIDGES]
    url: str = engine.url  # type: ignore[attr-defined]
    ranks = on_ranks(published_over_each, url, values, world_size=place.learner, device=DEVICE)
    for first, *others in zip(*ranks, strict=True):
        receipts = [report.receipt for report in first["reports"]]
        assert all([report.receipt for report in other["reports"]] == receipts for other in others)
        assert receipts[-1].digest == model_digest(parameter_digests(first["weights"].items()))
    _, broadcast = ranks[0]
    size = sum(weight.nbytes for weight in broadcast["weights"].values())
    whole, *few = [report.num_bytes / size for report in broadcast["reports"]]
    assert whole > 1 > 0.5 > max(few)
    assert engine.receipt() == broadcast["reports"][-1].receipt
    side = Side("broadcast", engine, model_path, tmp_path)
    side.model = plain_model(model_path, broadcast["weights"])
    assert side.mismatch() < TOLERANCE
