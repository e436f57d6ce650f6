"""`syncline report DIR [DIR …]`: writes the report page of a run or a pipeline again, or compares several runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from syncline.errors import ConfigError

PIPELINE_FILE = "pipeline.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="DIR", help="the run.dir of a run, or of a pipeline")
    parser.add_argument("--out", type=Path, help="where a page that compares several runs goes")


def run(args: argparse.Namespace) -> int:
    from syncline.observe.report import write_comparison_report, write_report
    from syncline.observe.summary import write_summary

    if any((d / PIPELINE_FILE).is_file() for d in args.run_dirs):
        return _of_pipelines(args.run_dirs)
    if missing := [str(d) for d in args.run_dirs if not (d / "metrics.jsonl").is_file()]:
        raise ConfigError([f"{d}: holds no metrics.jsonl; give the run.dir of a run that trained" for d in missing])
    for run_dir in args.run_dirs:
        write_summary(run_dir)
        print(write_report(run_dir))
    if len(args.run_dirs) > 1:
        if args.out is None:
            raise ConfigError(["--out: missing; say where the page that compares the runs goes"])
        print(write_comparison_report(args.run_dirs, args.out))
    return 0


def _of_pipelines(run_dirs: Sequence[Path]) -> int:
    from syncline.config.offline import load_offline
    from syncline.offline.report import write_offline_report

    for run_dir in run_dirs:
        config = load_offline(run_dir / PIPELINE_FILE)
        print(write_offline_report(run_dir, num_examples=config.report.num_examples))
    return 0
