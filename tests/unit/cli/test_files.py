"""The configuration file as a word or as `--config`, before or after options and fields."""

import argparse

import pytest

from syncline.cli import _parse
from syncline.cli.files import add_file, file_of
from syncline.errors import ConfigError


def given(*words: str) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb")
    verb = verbs.add_parser("serve")
    add_file(verb)
    verb.add_argument("--port", type=int)
    return file_of(_parse(parser, ["serve", *words]))


@pytest.mark.parametrize(
    "words",
    [
        ("run.yaml", "a.b=1", "c.d=2"),
        ("run.yaml", "a.b=1", "--port", "3", "c.d=2"),
        ("--port", "3", "run.yaml", "a.b=1", "c.d=2"),
        ("--config", "run.yaml", "a.b=1", "c.d=2"),
        ("a.b=1", "--config", "run.yaml", "--port", "3", "c.d=2"),
    ],
)
def test_every_order_says_the_same(words: tuple[str, ...]) -> None:
    assert given(*words) == ("run.yaml", ["a.b=1", "c.d=2"])


def test_no_file_or_two_are_refused() -> None:
    with pytest.raises(ConfigError, match="FILE: missing"):
        given("a.b=1")
    with pytest.raises(ConfigError, match=r"--config: 'x\.yaml' is given beside 'y\.yaml'; name one file"):
        given("--config", "x.yaml", "y.yaml")
