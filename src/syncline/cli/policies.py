"""The policies of a pipeline on its engines, which start when one is needed and move on by a bridge after each round.

A policy is known by the digest that the engines proved to hold. It is written down when they first held it, so that a
pipeline whose samples are all there needs no engine to know which policy gave them.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncline.cli.held import refuse_other_base
from syncline.config import RunConfig
from syncline.config.offline import OfflineConfig, engine_run
from syncline.errors import SyncError
from syncline.offline.stage import Notes, Stage, finished, run_stage, weights_digest

if TYPE_CHECKING:
    from syncline.protocols import Receipt

POLICY_FILE = "policy.json"


class Policies:
    """`model_path` is a folder; `given` are the URLs of running engines, `start` gives those of new ones."""

    def __init__(
        self, config: OfflineConfig, model_path: Path, *, given: tuple[str, ...], start: Callable[[RunConfig], Any]
    ) -> None:
        self._config, self._model_path, self._given, self._start = config, model_path, given, start
        self._stack = ExitStack()
        self._urls: tuple[str, ...] = ()
        self._base = weights_digest(model_path)

    def __enter__(self) -> "Policies":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def digest(self, adapter: Path | None, *, version: int) -> str:
        """Of the base with the adapter, as engines hold it; they are asked if nobody knows yet."""
        stage = self._stage(adapter)
        done = finished(Path(self._config.run.dir), stage)
        return done.facts["digest"] if done else self.serve(adapter, version=version)[1]

    def serve(self, adapter: Path | None, *, version: int) -> tuple[tuple[str, ...], str]:
        """The engines' URLs, once all hold this policy, and its digest. Raises `SyncError` when it is not the one that
        was written down, and for running engines that do not hold the base."""
        stage, run_dir = self._stage(adapter), Path(self._config.run.dir)
        known = finished(run_dir, stage)
        urls = self._running()
        facts: dict[str, Any] = asdict(self._held(urls))
        if adapter is None and known is None and self._given:
            seconds = self._config.engine.start_timeout_seconds  # those started here hold what they were started from
            refuse_other_base(urls[0], self._model_path, timeout_seconds=seconds)
        if adapter is not None and (known is None or facts["digest"] != known.facts["digest"]):
            facts = self._publish(adapter, urls, version=version)
        if known is not None and facts["digest"] != known.facts["digest"]:
            raise SyncError(
                f"the engines hold {facts['digest'][:12]} for what was {known.facts['digest'][:12]} before: another "
                f"device, type or bridge, or other weights; start them anew, or remove {known.folder}"
            )

        def note(notes: Notes) -> None:
            notes.facts |= facts
            (notes.folder / POLICY_FILE).write_text(json.dumps(facts) + "\n")

        run_stage(run_dir, stage, note, outputs=(POLICY_FILE,))
        return urls, facts["digest"]

    def _stage(self, adapter: Path | None) -> Stage:
        inputs = {"base": self._base} | ({"adapter": weights_digest(adapter)} if adapter else {})
        return Stage("policy", {"bridge": self._config.bridge.name, "dtype": self._config.model.dtype}, inputs)

    def _run(self) -> RunConfig:
        run = engine_run(self._config, str(self._model_path))
        return run.model_copy(update={"run": run.run.model_copy(update={"dir": f"{self._config.run.dir}/engines"})})

    def _running(self) -> tuple[str, ...]:
        if not self._urls:
            self._urls = self._given or self._stack.enter_context(self._start(self._run()))
        return self._urls

    def _held(self, urls: tuple[str, ...]) -> "Receipt":
        from syncline.cli.held import held_by

        return held_by(self._run(), urls)[0]

    def _publish(self, adapter: Path, urls: tuple[str, ...], *, version: int) -> dict[str, Any]:
        """The receipt and what the publish cost. The base is proved again each time: nobody keeps it in memory between
        rounds."""
        from syncline.bridges.ranks import ONE_RANK
        from syncline.cli.bridge import build_bridge, connect_engines
        from syncline.learner.model import assets_folder, learner_device, load_model
        from syncline.offline.adapters import adapted

        run = self._run()
        plain = run.model.model_copy(update={"lora": None})
        device = learner_device(run.learner.device)
        base = load_model(plain, device=device)
        model = adapted(base, adapter)
        with ExitStack() as stack:
            engines = connect_engines(run, urls, None, device=device, ranks=ONE_RANK)
            for engine in engines:
                stack.callback(engine.close)
            bridge = build_bridge(run, engines, assets_folder(str(self._model_path)), ranks=ONE_RANK)
            stack.callback(bridge.close)
            bridge.attach(model)
            report = bridge.publish(model, policy_version=version)
        costs = {"num_bytes": report.num_bytes, "seconds": report.seconds, "pause_seconds": report.pause_seconds}
        return asdict(report.receipt) | costs
