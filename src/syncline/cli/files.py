"""The configuration file of a verb, as a word or as `--config`, and the fields set over it."""

import argparse

from syncline.errors import ConfigError


def add_file(parser: argparse.ArgumentParser, *, help: str = "the run's YAML file") -> None:
    parser.add_argument("file", nargs="?", help=help)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields set over the file's")
    parser.add_argument("--config", metavar="FILE", help="the same file, named by an option")


def file_of(args: argparse.Namespace) -> tuple[str, list[str]]:
    """(file, overrides); options may stand before either. Raises `ConfigError` when there is no file, or two."""
    words = [word for word in (args.file, *args.overrides) if word is not None]
    files = [word for word in words if "=" not in word]
    if args.config is not None:
        if files:
            raise ConfigError([f"--config: {args.config!r} is given beside {files[0]!r}; name one file"])
        return args.config, words
    if not files:
        raise ConfigError(["FILE: missing; give the run's YAML file, or --config FILE"])
    words.remove(files[0])
    return files[0], words
