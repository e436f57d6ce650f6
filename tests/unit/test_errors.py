"""Errors that one rank tells the others of."""

import pickle

import pytest

from syncline.errors import ConfigError, SynclineError


def kinds(kind: type[SynclineError] = SynclineError) -> list[type[SynclineError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in kinds(below))]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_an_error_says_the_same_on_every_rank(kind: type[SynclineError]) -> None:
    raised = (
        ConfigError(["run.dir: is missing", "model.path: is missing"]) if kind is ConfigError else kind("it failed")
    )
    told = pickle.loads(pickle.dumps(raised))
    assert (type(told), str(told), vars(told)) == (kind, str(raised), vars(raised))
