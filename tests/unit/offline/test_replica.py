"""More connections than a process may open files."""

import resource

import pytest

from syncline.errors import ConfigError
from syncline.offline.replica import OTHER_FILES, allow_connections


def test_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, wanted: limits.append(wanted))
    allow_connections(1024 - OTHER_FILES, field="eval.concurrency")
    assert len(limits) == 1
    allow_connections(2000, field="eval.concurrency")
    assert limits[-1] == (2000 + OTHER_FILES, 4096)
    with pytest.raises(ConfigError, match=r"eval\.concurrency: 5000 connections .* may open 4096 files"):
        allow_connections(5000, field="eval.concurrency")
