"""What each bridge publishes from a sharded learner is what one process would: whole, merged, proved on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from rank_processes import on_ranks
from real_engine import make_tiny_model, run_values
from test_lora_bridge import FakeEngine as AdapterEngine
from test_restart_ranks import FileEngine

from syncline.bridges.ranks import DATA_PARALLEL, ONE_RANK, Ranks
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.cli.bridge import build_bridge
from syncline.config import RunConfig, resolve
from syncline.learner.adapter import base_parameters
from syncline.learner.model import checkpoint_parameters, load_model

CPU = torch.device("cpu")
KINDS = ("restart", "broadcast", "broadcast dora", "lora")


def config_of(kind: str, path: str, folder: str, *, size: int) -> RunConfig:
    bridge, _, beside = kind.partition(" ")
    values = run_values(Path(path), Path(folder))
    values["model"]["dtype"] = "float32"
    if beside or bridge == "lora":
        values["model"]["lora"] = {"rank": 4, "dora": beside == "dora"}
    values["bridge"] = {"name": bridge, "bucket_bytes": 50_000, "timeout_seconds": 60}
    values["learner"] = {"device": "cpu", "data_parallel_size": size}
    values["engine"] |= {"device": "cpu"}
    return resolve(values | {"learner": values["learner"] | {"token_budget": 512}})


def model_of(config: RunConfig, ranks: Ranks) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_model(config.model, device=CPU, running=config.learner, ranks=ranks)


@torch.no_grad()
def learn(model: torch.nn.Module) -> None:
    """The same on every rank's part as on the whole."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            getattr(parameter, "_local_tensor", parameter).mul_(1.5).add_(0.01)


def engine_of(kind: str, alone: torch.nn.Module) -> Any:
    wholes = dict(checkpoint_parameters(alone))
    if kind == "restart":
        return FileEngine(parameter_digests(wholes.items()))
    if kind.startswith("broadcast"):
        return FakeEngine("engine", wholes)
    engine = AdapterEngine("engine")
    base = dict(base_parameters(alone))
    engine.base = parameter_digests(base.items())
    engine.modules = {
        name.removesuffix(".weight"): list(weight.shape)[::-1] for name, weight in base.items() if weight.dim() == 2
    }
    return engine


def published(ranks: Ranks, kind: str, path: str, folder: str) -> tuple[Any, list[Any], bool]:
    """The receipts of two publishes, the engine's after each, and whether it was ever spoken to on this rank."""
    config = config_of(kind, path, folder, size=2)
    engine = engine_of(kind, load_model(config.model, device=CPU))
    bridge = build_bridge(config, [engine], Path(path), ranks=ranks)
    model = model_of(config, ranks)
    bridge.attach(model)
    receipts, held = [], []
    for version in range(2):
        with bridge.updating():
            learn(model)
            receipts.append(bridge.publish(model, policy_version=version).receipt)
        held.append(engine.receipt())
    bridge.close()
    if kind.startswith("broadcast"):
        engine.close()
    return receipts, held, bool(engine.calls)


def every_kind(ranks: Ranks, path: str, folder: str) -> dict[str, Any]:
    return {kind: published(ranks, kind, path, f"{folder}/{kind}") for kind in KINDS}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def ranks(path: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(every_kind, path, str(tmp_path_factory.mktemp("runs")), dimension=DATA_PARALLEL)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_holds_what_one_process_would_have_sent(path: str, ranks: Any, kind: str, tmp_path: Path) -> None:
    (receipts, held, spoken), (others, _, spoken_by_other) = (rank[kind] for rank in ranks)
    assert receipts == others == held
    assert [receipt.policy_version for receipt in held] == [0, 1]
    assert (spoken, spoken_by_other) == (True, False), "rank 0 alone speaks to the engine"
    config = config_of(kind, path, str(tmp_path), size=1)
    alone = model_of(config, ONE_RANK)
    learn(alone)
    learn(alone)
    if kind == "lora":
        bridge = build_bridge(config, [engine_of(kind, alone)], Path(path), ranks=ONE_RANK)
        bridge.attach(alone)
        expected = bridge.publish(alone, policy_version=1).receipt.digest
        bridge.close()
    else:
        expected = model_digest(parameter_digests(checkpoint_parameters(alone)))
    assert held[1].digest == expected
