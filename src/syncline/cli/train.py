"""`syncline train FILE`: the learner alone, against a running engine and trajectory server."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from syncline.cli.bridge import await_servers, brings_weights, build_bridge, connect_engines
from syncline.cli.files import add_file, file_of
from syncline.cli.ranks import is_rank, run_ranks
from syncline.config import RunConfig, load
from syncline.errors import ConfigError
from syncline.launch.plan import see_only, url

if TYPE_CHECKING:
    import torch

    from syncline.bridges.ranks import Ranks
    from syncline.engines.client import EngineController
    from syncline.learner.loop import Parts
    from syncline.learner.model import Scorer
    from syncline.learner.optim import SplitMasterAdamW
    from syncline.learner.parity import ParityGate
    from syncline.learner.step import Step
    from syncline.protocols import MetricSink, RolloutSource

log = logging.getLogger("syncline.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser, help="the run's YAML file; checkpoints in its run.dir are resumed from")
    parser.add_argument(
        "--engine-url",
        dest="engine_urls",
        metavar="URL",
        action="append",
        default=[],
        help="default: from engine.servers, or engine.port",
    )
    parser.add_argument("--trajectories-url", metavar="URL", help="default: from trajectory.port")
    parser.add_argument(
        "--bridge-config",
        metavar="PATH",
        help="find the first engine by its vllm_bridge_config.json: a file, a folder, or auto ($LOGDIR, here, "
        "/tmp/atropos_bridge)",
    )


def run(args: argparse.Namespace) -> int:
    from syncline.learner.distributed import num_ranks, refuse_other_number

    config = load(*file_of(args))
    if not is_rank():
        wanted = num_ranks(config.learner)
        if wanted == len(config.learner.devices):
            see_only("learner.devices", config.learner.devices, device=config.learner.device)
        if wanted > 1:
            return run_ranks(wanted, sys.argv[1:])
    refuse_other_number(config.learner)
    return learn(config, args)


def learn(config: RunConfig, args: argparse.Namespace, *, watch: "Callable[[Parts], Parts] | None" = None) -> int:
    """The learner, to its end. `watch` sees its parts before the first step, and may add to them."""
    from syncline.bridges.ranks import DATA_PARALLEL, TENSOR_PARALLEL
    from syncline.learner.distributed import joined_ranks, rank_device
    from syncline.learner.loop import train
    from syncline.learner.model import learner_device
    from syncline.observe.logs import set_up_logging

    trajectories_url = args.trajectories_url or _trajectories_url(config)
    device = rank_device(learner_device(config.learner.device))
    dimension = DATA_PARALLEL if config.learner.data_parallel_size > 1 else TENSOR_PARALLEL
    with joined_ranks(device, timeout_seconds=_longest_wait(config), dimension=dimension) as ranks:
        set_up_logging(logging.INFO if ranks.is_first else logging.WARNING)
        engines = connect_engines(config, args.engine_urls, args.bridge_config, device=device, ranks=ranks)
        with (
            assemble(config, ranks, device=device, engines=engines, trajectories_url=trajectories_url) as parts,
            parts.stop.listening() if ranks.world_size == 1 else nullcontext(),
        ):
            state = train(config, watch(parts) if watch else parts)
    log.info(
        "finished: step %d, policy version %d, %d tokens trained",
        state.step,
        state.policy_version,
        state.trained_tokens,
    )
    return 0


def _trajectories_url(config: RunConfig) -> str:
    if config.trajectory.port == 0:
        remedy = "set it for server and learner alike, or give --trajectories-url"
        raise ConfigError([f"trajectory.port: 0 is another port at each start; {remedy}"])
    return url(config.trajectory.host, config.trajectory.port)


def _longest_wait(config: RunConfig) -> float:
    """What other ranks must bear while rank 0 waits for the outside world, and a minute."""
    waits = (config.trajectory.wait_timeout_seconds, config.bridge.timeout_seconds, config.engine.start_timeout_seconds)
    return max(*waits, config.engine.request_timeout_seconds) + 60


def _set_up_torch(config: RunConfig, ranks: "Ranks") -> None:
    import torch

    torch.manual_seed(config.run.seed)
    if config.learner.num_threads:
        torch.set_num_threads(max(1, config.learner.num_threads // ranks.world_size))
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to sum in one order
        torch.use_deterministic_algorithms(True)


@contextmanager
def assemble(
    config: RunConfig,
    ranks: "Ranks",
    *,
    device: "torch.device",
    engines: Sequence["EngineController"],
    trajectories_url: str,
) -> Iterator["Parts"]:
    """Every part of the loop, built from the configuration and closed in reverse, the engines' connections too.

    Of several ranks, the first alone holds the sink and the source; what it is answered there, all are.
    """
    import torch

    from syncline.learner.checkpoint import Checkpoints
    from syncline.learner.distributed import on_first
    from syncline.learner.loop import Parts
    from syncline.learner.model import assets_folder, load_model
    from syncline.learner.optim import accumulate_fp32
    from syncline.observe.training_log import TrainingLog

    folder = Path(config.run.dir)
    training_log = None
    if config.observe.training_log and ranks.is_first:
        training_log = TrainingLog(config, [engine.url for engine in engines])
    _set_up_torch(config, ranks)
    lies_on, brought_to = (torch.device("cpu"), device) if brings_weights(config, ranks) else (device, None)
    model = load_model(config.model, device=device, running=config.learner, ranks=ranks, lies_on=lies_on)
    assets = assets_folder(config.model.path)
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.close)
        ranks.from_first(lambda: await_servers(config, engines))
        bridge = build_bridge(config, engines, assets, ranks=ranks, device=brought_to)
        stack.callback(bridge.close)
        newest = ranks.from_first(lambda: max((e.health()["newest_version"] for e in engines), default=-1))
        bridge.attach(model)
        if config.learner.gradients == "float32":
            accumulate_fp32(model)
        named = folder / config.learner.checkpoint_name
        checkpoints = Checkpoints(named.parent, config.learner.num_checkpoints, assets, ranks, named.name)
        resumed_step = checkpoints.newest_step()
        sink, source = (None, None)
        if ranks.is_first:
            sink, source = _outside(
                config, stack, trajectories_url=trajectories_url, resumed_step=resumed_step, training_log=training_log
            )
        if ranks.split_data:
            torch.manual_seed(config.run.seed + ranks.rank)  # other tokens, other dropout
        yield Parts(
            model=model,
            optimizer=_optimizer(config, model, ranks),
            step=_step(config, model, device, ranks),
            bridge=bridge,
            source=on_first(source, ranks),
            sink=on_first(sink, ranks),
            checkpoints=checkpoints,
            gate=_gate(config, [engine.url for engine in engines], ranks, model),
            device=device,
            newest_served=newest,
        )


def _outside(
    config: RunConfig, stack: ExitStack, *, trajectories_url: str, resumed_step: int, training_log: "MetricSink | None"
) -> tuple["MetricSink", "RolloutSource"]:
    from syncline.cli.trajectories import run_terms
    from syncline.envs.rendering import load_tokenizer
    from syncline.observe.exports import ExportingSink, open_exports
    from syncline.observe.sinks import JsonlSink, MultiSink
    from syncline.observe.training_log import CompletionsCsv
    from syncline.trajectory.client import TrajectorySource
    from syncline.trajectory.guard import TOKEN_VARIABLE

    folder, tokenizer = Path(config.run.dir), load_tokenizer(config.model.tokenizer or config.model.path)
    exports = open_exports(config.observe, folder, resumed_step=resumed_step)
    own: list[MetricSink] = [JsonlSink(folder, resumed_step=resumed_step, decode=tokenizer.decode)]
    if config.observe.completions_csv:
        own += [CompletionsCsv(Path(config.observe.completions_csv), resumed_step=resumed_step)]
    own += [training_log] if training_log else []
    sink = ExportingSink(MultiSink(own), exports)
    stack.callback(sink.close)
    source = TrajectorySource(
        trajectories_url,
        terms=run_terms(config),
        token=os.environ.get(TOKEN_VARIABLE),
        wait_timeout_seconds=config.trajectory.wait_timeout_seconds,
    )
    return sink, stack.enter_context(source)


def _optimizer(config: RunConfig, model: "torch.nn.Module", ranks: "Ranks") -> "SplitMasterAdamW":
    from syncline.learner.model import causal_lm, trainable_parameters
    from syncline.learner.optim import SplitMasterAdamW
    from syncline.learner.parts import family_of_model, rate_factors

    rates = rate_factors(config.learner.optimizer, family_of_model(causal_lm(model)))
    return SplitMasterAdamW(trainable_parameters(model), config.learner.optimizer, ranks=ranks, rate_factors=rates)


def _scorer(config: RunConfig, model: "torch.nn.Module") -> "Scorer":
    from syncline.learner.model import Scorer, causal_lm
    from syncline.learner.vision import Vision

    vision = Vision.of(causal_lm(model).config, config.model.path)
    return Scorer(config.sampling.temperature, config.learner.logprob_chunk_tokens, vision)


def _step(config: RunConfig, model: "torch.nn.Module", device: "torch.device", ranks: "Ranks") -> "Step":
    from syncline.learner.model import Reference
    from syncline.learner.step import Step

    reference = None
    if config.learner.loss.kl_coef > 0:
        reference = Reference.of(model, config.model, running=config.learner, device=device, ranks=ranks)
    return Step(
        config=config.learner,
        scorer=_scorer(config, model),
        reference=reference,
        device=device,
        max_completion_tokens=config.sampling.max_tokens,
        num_steps=config.run.num_steps,
        ranks=ranks,
    )


def _gate(config: RunConfig, engine_urls: Sequence[str], ranks: "Ranks", model: "torch.nn.Module") -> "ParityGate":
    from syncline.engines.pool import EnginePool
    from syncline.envs.rendering import load_tokenizer, rendered
    from syncline.learner.parity import ParityGate
    from syncline.observe.images import image_ref
    from syncline.types import Message

    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    shown = [Message("user", config.parity.prompts[0], (image_ref(path),)) for path in config.parity.images]
    return ParityGate(
        config=config.parity,
        connect=lambda: EnginePool(engine_urls, timeout_seconds=config.engine.request_timeout_seconds),
        encode=lambda text: tokenizer.encode(text),
        temperature=config.sampling.temperature,
        scorer=_scorer(config, model),
        token_budget=config.learner.token_budget,
        ranks=ranks,
        shown=tuple((tuple(rendered(tokenizer, [turn])), turn.images[0]) for turn in shown),
    )
