"""Errors that one rank tells the others of."""

import pickle

import pytest

from syncline import errors
from syncline.errors import ConfigError, SynclineError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SynclineError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_says_the_same_on_every_rank(kind: type[SynclineError]) -> None:
    raised = (
        ConfigError(["run.dir: is missing", "model.path: is missing"]) if kind is ConfigError else kind("it failed")
    )
    told = pickle.loads(pickle.dumps(raised))
    assert (type(told), str(told), vars(told)) == (kind, str(raised), vars(raised))
