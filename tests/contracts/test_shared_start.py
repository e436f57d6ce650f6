"""A learner that shares an engine's weights starts without its own beside them, and trains the engine's.

The engine is a process that lends its memory, as vLLM's worker does.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engine import make_tiny_model
from resumed_learner import Kind, recorded_group

from syncline.bridges import digest
from syncline.bridges.carriers import whereabouts
from syncline.bridges.handles import export_views, move_to_memory_file
from syncline.bridges.lora import LoraBridge
from syncline.bridges.receipt import parameter_digests
from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge, Lora, Model, Optimizer
from syncline.learner.adapter import AdapterLayers, base_parameters
from syncline.learner.model import Scorer, checkpoint_shards, load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
from syncline.learner.packing import pack_samples
from syncline.protocols import Paused, Receipt

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARED = Bridge(name="shared")


def lend(path: str, asked: Connection) -> None:
    """Tells where its weights lie, and what they are whenever it is asked, until the other end is closed."""
    model = load_model(Model(path=path, dtype="bfloat16"), device=DEVICE)
    memory_file = move_to_memory_file(model.parameters()) if DEVICE.type == "cpu" else None
    shards = dict(checkpoint_shards(model))
    asked.send(export_views(shards.items(), memory_file=memory_file))
    while asked.recv() == "digests":
        asked.send(parameter_digests((name, shard.tensor) for name, shard in shards.items()))


class Lender:
    """As much of an engine as `attach` asks for."""

    name = "engine"

    def __init__(self, asked: Connection) -> None:
        self._asked = asked
        self._exported = asked.recv()
        self.modules: dict[str, list[int]] = {}

    def wait_until_ready(self, *, timeout_seconds: float) -> None: ...

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool) -> Paused:
        return Paused(Receipt(-1, ""))

    def parameters(self) -> dict[str, str]:
        self._asked.send("digests")
        return self._asked.recv()

    def export(self) -> list[dict[str, Any]]:
        return [self._exported]

    def adapters(self) -> dict[str, Any]:
        about = {"dtype": "bfloat16", "max_rank": 8, "modules": self.modules}
        return about | {"whereabouts": [whereabouts(DEVICE)]}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=1024))


@pytest.fixture
def lender(model_path: str) -> Iterator[Lender]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=lend, args=(model_path, theirs))
    process.start()
    try:
        yield Lender(ours)
    finally:
        process.kill()
        process.join()


def held_bytes() -> int:
    """On the GPU, whose peak counts from now on; nothing on a CPU."""
    if DEVICE.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["whole", "an adapter"])
def test_the_learner_has_the_engines_weights_and_never_its_own_on_the_device(
    lender: Lender, model_path: str, tmp_path: Path, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "BATCH_BYTES", 1 << 20)  # of a base that is proved, so much is there at once
    model: Any = load_model(Model(path=model_path, dtype="bfloat16", lora=lora), device=DEVICE, lies_on=CPU)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if lora is None:
        bridge = SharedBridge([lender], SHARED, shards=checkpoint_shards, device=DEVICE)  # pyright: ignore
    else:
        lender.modules = {name: [layer.a.shape[1], layer.b.shape[0]] for name, layer in AdapterLayers()(model)}
        whose = {"base": base_parameters, "layers": AdapterLayers(), "folder": tmp_path}
        bridge = LoraBridge([lender], SHARED, **whose, shares_base=True, device=DEVICE)  # pyright: ignore
    held = held_bytes()
    bridge.attach(model)
    assert peak_bytes() - held < num_bytes / 2
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {DEVICE.type}
    before = lender.parameters()
    step(model)
    assert parameter_digests(base_parameters(model)) == lender.parameters()
    assert (lender.parameters() == before) == (lora is not None), "an adapter's step leaves the base as it is"
    bridge.close()


def step(model: Any) -> None:
    accumulate_fp32(model)
    optimizer = SplitMasterAdamW(trainable_parameters(model), Optimizer())
    samples = [sample for rollout in recorded_group(Kind(), 0).rollouts for sample in rollout.samples]
    for batch in pack_samples(samples, token_budget=128):
        Scorer(1.0, 256).score(model, batch.to(DEVICE))[0].sum().backward()
    optimizer.step(1e-2)
