"""Metrics for TensorBoard, wandb or trackio, beside the run's own files: for those who name them in `observe.sinks`.

A library is imported only when named. Each start of the learner is a run of its own there, within one group, because
none of them takes a step back when a run resumes from an earlier one. What fails while the run goes on loses these
metrics and nothing else: it is said in the log, and counted in the next step's `observe/NAME/failures`.
"""

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from syncline.config.schema import Observe
from syncline.errors import ConfigError
from syncline.protocols import MetricSink
from syncline.types import RolloutGroup

FINISH_SECONDS = 60.0
"""What a library may take at the end, to send what it still holds."""

log = logging.getLogger(__name__)


class Export(Protocol):
    """A run in one of these libraries: what wandb's and trackio's are already."""

    def log(self, metrics: dict[str, Any], /, step: int | None = None) -> Any: ...
    def finish(self) -> Any: ...


class ExportingSink:
    """`own`, which must work, and the exports, which may fail."""

    def __init__(
        self, own: MetricSink, exports: Mapping[str, Export], *, finish_seconds: float = FINISH_SECONDS
    ) -> None:
        self._own, self._exports = own, exports
        self._finish_seconds = finish_seconds
        self._failures = dict.fromkeys(exports, 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        counted = {**metrics, **{f"observe/{name}/failures": float(n) for name, n in self._failures.items()}}
        self._own.log(step, counted)
        for name, export in self._exports.items():
            self._try(name, f"step {step}", lambda export=export: export.log(counted, step=step))

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        self._own.log_rollouts(step, groups, advantages)

    def close(self) -> None:
        self._own.close()
        for name, export in self._exports.items():
            ending = threading.Thread(target=self._try, args=(name, "the end of the run", export.finish), daemon=True)
            ending.start()
            ending.join(self._finish_seconds)
            if ending.is_alive():
                log.warning("observe.sinks: %s had not finished after %g s; not waited for", name, self._finish_seconds)

    def _try(self, name: str, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # the boundary to libraries of others: none of them may end a training run
            self._failures[name] += 1
            log.warning("observe.sinks: %s did not take %s: %s: %s", name, what, type(error).__name__, error)


def open_exports(observe: Observe, folder: Path, *, resumed_step: int) -> dict[str, Export]:
    """Raises `ConfigError` for a package that is missing or cannot start, for instance without a login."""
    faults = missing_packages(observe)
    if faults:
        raise ConfigError(faults)
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _open(name, observe, folder, resumed_step) for name in observe.sinks}


def missing_packages(observe: Observe) -> list[str]:
    """A sentence for each package that `observe.sinks` needs and this Python has not."""
    return [
        f"observe.sinks: {name!r} needs the package {name}; pip install {name}, or leave it out"
        for name in observe.sinks
        if (found := importlib.util.find_spec(name)) is None or found.origin is None
    ]


def _open(name: str, observe: Observe, folder: Path, resumed_step: int) -> Export:
    group = observe.group or folder.resolve().name
    start = f"from-step-{resumed_step}"
    try:
        return _OPENERS[name](observe.project, group, start, folder)
    except Exception as error:  # the same boundary, before the run begins
        raise ConfigError(
            [f"observe.sinks: {name!r} did not start ({type(error).__name__}: {error}); mend that, or leave it out"]
        ) from error


def _tensorboard(project: str, group: str, start: str, folder: Path) -> Export:
    from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

    return _TensorBoard(Writer(str(folder / "tensorboard" / start)))


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, metrics: dict[str, Any], /, step: int | None = None) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def _wandb(project: str, group: str, start: str, folder: Path) -> Export:
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.Settings(console="off")
    return wandb.init(project=project, group=group, name=f"{group} {start}", dir=str(folder), settings=settings)


def _trackio(project: str, group: str, start: str, folder: Path) -> Export:
    import trackio  # pyright: ignore[reportMissingImports]

    quiet: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    return trackio.init(project, name=f"{group} {start}", group=group, resume="allow", **quiet)


_OPENERS: dict[str, Callable[[str, str, str, Path], Export]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
