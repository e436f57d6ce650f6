"""`syncline train FILE`: the learner alone, against a running engine and trajectory server."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from syncline.config import RunConfig, load

if TYPE_CHECKING:
    import torch

    from syncline.learner.loop import Parts
    from syncline.learner.parity import ParityGate
    from syncline.learner.step import Step
    from syncline.protocols import EngineControl, WeightBridge

log = logging.getLogger("syncline.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file; checkpoints in its run.dir are resumed from")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append", required=True)
    parser.add_argument("--trajectories-url", required=True)


def run(args: argparse.Namespace) -> int:
    from syncline.learner.loop import train
    from syncline.observe.logs import set_up_logging

    set_up_logging()
    config = load(args.file, args.overrides)
    with assemble(config, engine_urls=args.engine_urls, trajectories_url=args.trajectories_url) as parts:
        state = train(config, parts)
    log.info(
        "finished: step %d, policy version %d, %d tokens trained",
        state.step,
        state.policy_version,
        state.trained_tokens,
    )
    return 0


@contextmanager
def assemble(config: RunConfig, *, engine_urls: Sequence[str], trajectories_url: str) -> Iterator["Parts"]:
    """Every part of the loop, built from the configuration and closed in reverse."""
    import torch

    from syncline.engines.client import EngineController
    from syncline.learner.checkpoint import Checkpoints
    from syncline.learner.loop import Parts
    from syncline.learner.model import (
        assets_folder,
        learner_device,
        load_model,
        trainable_parameters,
    )
    from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
    from syncline.observe.sinks import JsonlSink
    from syncline.trajectory.client import TrajectorySource

    folder = Path(config.run.dir)
    device = learner_device(config.learner.device)
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    model = load_model(config.model, device=device, gradient_checkpointing=config.learner.gradient_checkpointing)
    accumulate_fp32(model)
    assets = assets_folder(config.model.path)
    with ExitStack() as stack:
        timeout_seconds = config.engine.start_timeout_seconds
        engines = [EngineController(url, start_timeout_seconds=timeout_seconds) for url in engine_urls]
        for engine in engines:
            stack.callback(engine.close)
            engine.wait_until_ready(timeout_seconds=timeout_seconds)
        bridge = _bridge(config, engines, assets)
        stack.callback(bridge.close)
        bridge.attach(model)
        checkpoints = Checkpoints(folder / "checkpoints", config.learner.num_checkpoints, assets)
        sink = JsonlSink(folder, resumed_step=checkpoints.newest_step())
        stack.callback(sink.close)
        source = stack.enter_context(
            TrajectorySource(trajectories_url, wait_timeout_seconds=config.trajectory.wait_timeout_seconds)
        )
        yield Parts(
            model=model,
            optimizer=SplitMasterAdamW(trainable_parameters(model), config.learner.optimizer),
            step=_step(config, model, device),
            bridge=bridge,
            source=source,
            sink=sink,
            checkpoints=checkpoints,
            gate=_gate(config, engine_urls),
            device=device,
        )


def _bridge(config: RunConfig, engines: Sequence["EngineControl"], assets: Path) -> "WeightBridge":
    from syncline.bridges.restart import RestartBridge
    from syncline.bridges.shared import SharedBridge
    from syncline.learner.model import checkpoint_parameters

    if config.bridge.name == "shared":
        return SharedBridge(engines, config.bridge, parameters=lambda model: model.named_parameters())
    return RestartBridge(
        engines,
        config.bridge,
        export=checkpoint_parameters,
        folder=Path(config.run.dir) / "weights",
        assets=assets,
    )


def _step(config: RunConfig, model: "torch.nn.Module", device: "torch.device") -> "Step":
    from syncline.learner.model import Reference, Scorer
    from syncline.learner.step import Step

    needs_reference = config.learner.loss.kl_coef > 0
    return Step(
        config=config.learner,
        scorer=Scorer(config.sampling.temperature, config.learner.logprob_chunk_tokens),
        reference=Reference.of(model, config.model, device=device) if needs_reference else None,
        device=device,
        max_completion_tokens=config.sampling.max_tokens,
        num_steps=config.run.num_steps,
    )


def _gate(config: RunConfig, engine_urls: Sequence[str]) -> "ParityGate":
    from transformers import AutoTokenizer

    from syncline.engines.pool import EnginePool
    from syncline.learner.model import Scorer
    from syncline.learner.parity import ParityGate

    tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer or config.model.path)
    return ParityGate(
        config=config.parity,
        connect=lambda: EnginePool(engine_urls, timeout_seconds=config.engine.request_timeout_seconds),
        encode=lambda text: tokenizer.encode(text),
        temperature=config.sampling.temperature,
        scorer=Scorer(config.sampling.temperature, config.learner.logprob_chunk_tokens),
        token_budget=config.learner.token_budget,
    )
