"""`syncline collect FILE`: rollouts of one frozen policy, scored by Regime W; goes on where it was killed."""

import argparse
import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from syncline.config.offline import OfflineConfig, engine_run, load_offline
from syncline.errors import CheckpointError, ConfigError

log = logging.getLogger("syncline.collect")
STAGE = "collect"
LOCAL_ONLY = {"requests_per_engine", "lost_after_seconds"}
"""Fields of `collect` that no result depends on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the pipeline's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument(
        "--engine-url",
        dest="engine_urls",
        metavar="URL",
        action="append",
        default=[],
        help="a running engine, as often as there are engines; without it they are started, and stopped",
    )


def run(args: argparse.Namespace) -> int:
    from syncline.observe.logs import set_up_logging

    set_up_logging()
    config = load_offline(args.file, args.overrides)
    with engines(config, args.engine_urls) as urls:
        done = collect_stage(config, lambda: urls, given=bool(args.engine_urls))
    for name, value in done.facts.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    print(done.folder / "rollouts.jsonl")
    return 0


@contextmanager
def engines(config: OfflineConfig, given: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Those at the URLs, or as many as the file says, started here."""
    from syncline.offline.engines import running_engines

    if given:
        yield tuple(given)
        return
    adapted = config.model_copy(update={"run": config.run.model_copy(update={"dir": f"{config.run.dir}/engines"})})
    with running_engines(engine_run(adapted, _model(config))) as urls:
        yield urls


def _refuse_other_weights(config: OfflineConfig, url: str) -> None:
    """Of one engine: others were found to hold the same. Says so where it cannot be told: weights that lie where the
    engines run, or a machine without torch. Rollouts carry the digest of what sampled them in any case."""
    try:
        from syncline.cli.held import refuse_other_base
        from syncline.learner.model import assets_folder

        folder, seconds = assets_folder(_model(config)), config.engine.request_timeout_seconds
        refuse_other_base(url, folder, timeout_seconds=seconds, adapted=config.collect.adapter is not None)
    except (ImportError, ConfigError, CheckpointError) as error:
        log.warning("that %s holds the weights of model.path = %r is not proved: %s", url, config.model.path, error)


def _model(config: OfflineConfig) -> str:
    """What engines serve: `model.path`, or what the file's `merge` makes of it."""
    if config.merge is None:
        return config.model.path
    from syncline.cli.merge import model_folder

    return str(model_folder(config))


def collect_stage(
    config: OfflineConfig,
    engine_urls: Callable[[], tuple[str, ...]],
    *,
    given: bool = False,
    gpus: tuple[str, ...] | None = None,
    model: str | None = None,
) -> Any:
    """The finished stage. `model`: the digest of what the engines hold; absent, they are asked. `engine_urls` is called
    when something is to be sampled, or asked. `given`: they ran already, and may hold another model. `gpus` are those
    that `engine.devices` counts; absent: all seen here."""
    from syncline.launch.plan import Machine
    from syncline.offline.collect import ROLLOUTS_FILE, Place, collect, model_held
    from syncline.offline.stage import Notes, Stage, run_stage, tokenizer_digest

    timeout = config.engine.request_timeout_seconds
    held = model or asyncio.run(model_held(engine_urls(), adapter=config.collect.adapter, timeout_seconds=timeout))
    if given:
        _refuse_other_weights(config, engine_urls()[0])
    tokenizer = config.model.tokenizer or config.model.path
    known = config.collect.model_dump(mode="json", exclude=LOCAL_ONLY)
    asked = {"collect": known, "seed": config.run.seed, "max_length": config.model.max_length}
    inputs = {"model": held, "tokenizer": tokenizer_digest(tokenizer), **_questions_digest(config)}
    stage = Stage(STAGE, asked, inputs)
    gpus = Machine.here().gpus if gpus is None else gpus

    def work(notes: Notes) -> None:
        place = Place(
            folder=notes.folder,
            engine_urls=engine_urls(),
            tokenizer=tokenizer,
            max_length=config.model.max_length,
            timeout_seconds=timeout,
            slots=config.engine.max_num_seqs,
            gpus=tuple(gpus[i] for i in config.engine.devices if i < len(gpus)),
        )
        found = collect(config.collect, place, model=held, seed=config.run.seed, show=partial(print, flush=True))
        notes.tokens = found["total_tokens"]
        notes.facts |= found

    return run_stage(Path(config.run.dir), stage, work, outputs=(ROLLOUTS_FILE,))


def _questions_digest(config: OfflineConfig) -> dict[str, str]:
    from syncline.offline.stage import file_digest

    path = config.collect.questions.path
    return {"questions": file_digest(Path(path))} if path and Path(path).is_file() else {}
