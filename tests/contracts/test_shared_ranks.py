"""`shared` between a learner's ranks and as many of a real vLLM: one copy of every piece, proved and never torn."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import Noticed
from rank_processes import on_ranks
from real_engine import make_tiny_model, run_values, running_engine
from test_weight_bridge import DEVICE, DTYPE, TOLERANCE, Side
from transformers import AutoModelForCausalLM

from syncline.bridges.ranks import Ranks
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge, Model
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import SyncError
from syncline.learner.distributed import on_first, rank_device
from syncline.learner.model import checkpoint_shards, load_model
from syncline.learner.places import wholes
from syncline.protocols import Receipt
from syncline.types import Completion, SamplingParams

pytestmark = pytest.mark.e2e
PROMPTS = tuple(tuple(range(5 + i, 12 + i)) for i in range(6))
NUM_STEPS = 3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            ranks,
            id=f"tp{ranks}",
            marks=[
                pytest.mark.contract("shared", ranks),
                pytest.mark.skipif(0 < torch.cuda.device_count() < ranks, reason=f"needs {ranks} GPUs"),
                *([pytest.mark.slow] if ranks > 2 else []),
            ],
        )
        for ranks in (2, 4)
    ],
)
def num_ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def engine(num_ranks: int, model_path: Path, tmp_path_factory) -> Iterator[EngineController]:
    folder = tmp_path_factory.mktemp("engine")
    values = run_values(model_path, folder / "run", bridge={"name": "shared"})
    split = {"device": DEVICE, "devices": list(range(num_ranks)), "tensor_parallel_size": num_ranks}
    for section in ("engine", "learner"):
        values[section] = values.get(section, {}) | split
    with running_engine(values, folder) as controller:
        yield controller


class Sampling:
    """Requests in flight at all times, on a thread of their own, until `end`."""

    def __init__(self, url: str) -> None:
        self.completions: list[tuple[tuple[int, ...], Completion]] = []
        self._url = url
        self._arrived = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._sample()), daemon=True)
        self._thread.start()

    def wait_for(self, version: int) -> None:
        """Until something was sampled under this version."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: version in self._versions(), 120), f"nothing of version {version}"

    def end(self) -> list[tuple[tuple[int, ...], Completion]]:
        self._over.set()
        self._thread.join(120)
        return self.completions

    def _versions(self) -> set[int]:
        return {completion.versions[0].policy_version for _, completion in self.completions}

    async def _sample(self) -> None:
        async with EngineClient(self._url, timeout_seconds=120) as client:
            await asyncio.gather(*(self._keep_asking(client, prompt) for prompt in PROMPTS))

    async def _keep_asking(self, client: EngineClient, prompt: tuple[int, ...]) -> None:
        while not self._over.is_set():
            [completion] = await client.generate(prompt, SamplingParams(30, temperature=0.8))
            with self._arrived:
                self.completions.append((prompt, completion))
                self._arrived.notify_all()


def stepped(ranks: Ranks, url: str, path: str) -> dict[str, Any]:
    """Steps that move every weight of both ranks while rank 0 samples; then what each version's whole weights were."""
    control = EngineController(url, timeout_seconds=60)
    model = load_model(Model(path=path), device=rank_device(torch.device(DEVICE)), ranks=ranks)
    bridge = SharedBridge([control], Bridge(name="shared"), shards=checkpoint_shards, ranks=ranks)
    bridge.attach(model)
    receipts = [bridge.publish(model, policy_version=0).receipt]
    weights = [whole_weights(model, ranks)]
    sampling = on_first(Sampling(url) if ranks.is_first else None, ranks)
    for version in range(1, NUM_STEPS + 1):
        sampling.wait_for(version - 1)
        with bridge.updating():
            move_every_weight(model, version)
            receipts.append(bridge.publish(model, policy_version=version).receipt)
        weights.append(whole_weights(model, ranks))
    sampling.wait_for(NUM_STEPS)
    completions = sampling.end()
    control.close()
    return {"receipts": receipts, "weights": weights, "completions": completions}


def whole_weights(model: Any, ranks: Ranks) -> dict[str, torch.Tensor]:
    return {name: whole.cpu().clone() for name, whole in wholes(checkpoint_shards(model), ranks)}


def move_every_weight(model: Any, version: int) -> None:
    """Copies move alike on the ranks that hold them (key heads too, where there are fewer than ranks), other pieces
    each in its own way."""
    for index, (_, shard) in enumerate(checkpoint_shards(model)):
        generator = torch.Generator().manual_seed(1000 * version + index + 100_000 * sum(shard.start))
        noise = 0.1 * torch.randn(shard.tensor.shape, generator=generator)
        shard.tensor.data.add_(noise.to(shard.tensor))


def test_a_learner_of_another_number_of_ranks_is_refused(
    engine: EngineController, num_ranks: int, model_path: Path, noticed: Noticed
) -> None:
    model = load_model(Model(path=str(model_path)), device=torch.device(DEVICE))
    bridge = SharedBridge([engine], Bridge(name="shared"), shards=checkpoint_shards)
    with pytest.raises(SyncError, match=f"has {num_ranks} tensor-parallel ranks and the learner 1") as told:
        bridge.attach(model)
    noticed("wrong tensor parallelism", "shared", by="learner, at attach", told=told.value)


def test_every_version_is_proved_and_sampled_from_its_own_weights_alone(
    engine: EngineController, num_ranks: int, model_path: Path
) -> None:
    url = engine.url  # type: ignore[attr-defined]
    first, *others = on_ranks(stepped, url, str(model_path), device=DEVICE, world_size=num_ranks)
    digests = [model_digest(parameter_digests(weights.items())) for weights in first["weights"]]
    expected = [Receipt(version, digest) for version, digest in enumerate(digests)]
    assert all(rank["receipts"] == expected for rank in (first, *others))
    assert engine.receipt() == expected[-1]
    assert len(set(digests)) == NUM_STEPS + 1
    models = [plain_model(model_path, weights) for weights in first["weights"]]
    for prompt, completion in first["completions"]:
        [span] = completion.versions
        assert Side.difference(prompt, completion, models[span.policy_version]) < TOLERANCE


def plain_model(path: Path, weights: dict[str, torch.Tensor]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE).to(DEVICE)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model
