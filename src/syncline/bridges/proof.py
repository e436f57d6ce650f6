"""What every bridge does around moving weights: refuse to go back, prove, and leave nothing running on a failure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from syncline.bridges.receipt import differences
from syncline.errors import EngineError, SyncError
from syncline.protocols import EngineControl, Receipt


@contextmanager
def paused_on_failure(engine: EngineControl, *, timeout_seconds: float) -> Iterator[None]:
    """Nothing is sampled from a state nobody proved; an engine that no longer answers samples nothing anyway."""
    try:
        yield
    except BaseException:
        with suppress(EngineError):
            engine.pause(mode="abort", timeout_seconds=timeout_seconds)
        raise


def refuse_backwards(engine: EngineControl, served: Receipt, *, policy_version: int) -> None:
    if policy_version < served.policy_version:
        raise SyncError(
            f"policy_version {policy_version} is older than {served.policy_version}, which engine {engine.name} "
            "already serves; versions only grow, so restart the engine to go back"
        )


def prove(engine: EngineControl, held: Receipt, expected: Receipt, *, digests: Mapping[str, str]) -> None:
    """Raises `SyncError` naming the parameters that differ, unless the engine holds what the learner computed."""
    if held != expected:
        faults = differences(digests, engine.parameters())
        raise SyncError(
            f"engine {engine.name} holds version {held.policy_version} digest {held.digest[:12]} after a publish of "
            f"version {expected.policy_version} digest {expected.digest[:12]}:\n" + "\n".join(faults)
        )


def refuse_other_model(engine: EngineControl, learner: Mapping[str, str]) -> None:
    """`learner` is name → `dtype[shape]`. Raises `SyncError` naming what is missing, extra or of another kind."""
    served = {name: digest.partition(":")[0] for name, digest in engine.parameters().items()}
    if faults := differences(learner, served):
        raise SyncError(f"engine {engine.name} serves another model than the learner trains:\n" + "\n".join(faults))
