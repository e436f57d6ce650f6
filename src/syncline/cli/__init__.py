"""The command line: one file a verb, and the only code that knows every room.

Each verb's module has `add_arguments(parser)` and `run(args) -> exit code`; it is imported when its verb is called.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from syncline.errors import SynclineError

VERBS = {
    "check": "print the resolved configuration and the process plan",
    "plan": "estimate memory and time, propose a split of the GPUs",
    "run": "train: start every process of a run, watch, stop",
    "serve": "the inference engines (vLLM) alone",
    "trajectories": "the trajectory server alone",
    "env": "one environment: take tasks, sample groups, score, post; or write a new one",
    "process": "sample groups without a trainer: JSON lines and a page to read",
    "view": "a page of the groups in a JSON lines file",
    "train": "the learner alone",
    "verify": "whether a running engine holds a checkpoint's weights",
    "evaluate": "accuracy on held-out tasks, of a run's environments or a pipeline's sets (also: eval)",
    "bench": "measure the bridges beside the link and TRL",
    "pipeline": "collect, pairs, DPO, evaluate and report, in one command that can be killed and run again",
    "merge": "an adapter merged into its base, proved by logits",
    "collect": "rollouts of one policy, scored by Regime W, for preferences",
    "pairs": "preferences from rollouts: right over wrong, coherent over less so",
    "dpo": "train an adapter on preference pairs",
    "report": "write a run's report page again",
}
ALIASES = {"eval": "evaluate"}
READER_LEFT = 141
"""128 + SIGPIPE: what is printed goes into a pipe (`| head`) that was closed."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    argv[:1] = [ALIASES.get(verb, verb) for verb in argv[:1]]
    parser = argparse.ArgumentParser(prog="syncline", description="GRPO with learner and engine provably in sync.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    modules = {}
    for verb, description in VERBS.items():
        subparser = verbs.add_parser(verb, help=description, description=description)
        if verb in argv[:1]:
            modules[verb] = importlib.import_module(f"syncline.cli.{verb}")
            modules[verb].add_arguments(subparser)
    args = _parse(parser, argv)
    try:
        code = modules[args.verb].run(args)
        sys.stdout.flush()
        return code
    except SynclineError as error:
        print(f"syncline {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise
        return READER_LEFT


def _nobody_reads(stream: TextIO) -> bool:
    """Then what it still holds goes nowhere, so that the interpreter's own flush at its end says nothing."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """`a.b=c` may stand before and after the options; argparse alone takes positional words in one place only."""
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args
