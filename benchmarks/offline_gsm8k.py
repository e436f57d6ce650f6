r"""The offline pipeline on GSM8K, start to end on one GPU within minutes: what it samples, survives and improves.

    python benchmarks/offline_gsm8k.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out runs/gsm8k
    … --model FOLDER dpo.num_epochs=1 'engine.extra={compilation_config: {mode: 0, cudagraph_mode: FULL_DECODE_ONLY}}'

The model is warmed up on the training questions behind the first `--questions` (`gsm8k_model.py`). One set of engines,
several on the GPU, then serves everything: the two slow ways and `syncline collect` (`offline_collect.py`) on these
first questions, and `syncline pipeline` with a seed of its own: it evaluates the test questions, is killed by SIGKILL
in its collection, and called again to the end, evaluation after DPO included. The table has what is known by
`--deadline`.
"""

import argparse
import asyncio
import gc
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from gsm8k_model import folder_of_gguf, warm_up
from offline_collect import Measured, by_questions, collected, table, verdicts, with_hf, work

from syncline.cli.assess import told, told_comparison
from syncline.cli.collect import engines
from syncline.config.offline import OfflineConfig, load_offline
from syncline.config.offline_collect import Questions
from syncline.observe.files import last_lines, read_object, write_atomically
from syncline.observe.summary import SUMMARY_FILE
from syncline.offline.collect import ATTEMPTS_FILE
from syncline.offline.questions import load_questions
from syncline.offline.stage import MANIFEST_FILE

POLL_SECONDS = 0.05
ALL_ENGINES = 0.72
"""Of the GPU's memory; the rest is for DPO."""


class OutOfTime(KeyboardInterrupt):
    """The deadline. A kind of interrupt, because event loops pass these on."""


@dataclass(slots=True)
class Found:
    """What the table is made of, as far as it got."""

    lines: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        print(f"[{began - self.started:.0f} s] {name} …", flush=True)
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began

    def table(self) -> list[str]:
        spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        parts = [line for title, lines in self.lines.items() for line in (f"\n## {title}", "", *lines)]
        return [*parts, "", f"seconds: {spent}; in all {time.monotonic() - self.started:.0f}"]


def main() -> int:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    found = Found()
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, args.deadline)
    with ExitStack() as stack:
        try:
            everything(args, found, stack)
            ended = ""
        except (Exception, KeyboardInterrupt) as error:  # the table is told whatever happens
            traceback.print_exc()
            ended = f"broken off by {error!r}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        lines = [*found.table(), *([ended] if ended else [])]
        print("\n".join(lines), flush=True)
        write_atomically(args.out / "gsm8k.md", "\n".join(lines) + "\n")
    return 1 if ended else 0


def everything(args: argparse.Namespace, found: Found, stack: ExitStack) -> None:
    config = prepared(args, found)
    by_question, ways = work(config), list[Measured]()
    found.lines["Collecting"] = []

    def add(one: Measured) -> None:
        ways.append(one)
        found.lines["Collecting"][:] = table(ways)

    with found.phase("one trajectory at a time, HF generate"):
        if args.slow_seconds:
            add(with_hf(config, by_question, args.slow_seconds))
        gc.collect()
        torch.cuda.empty_cache()  # of the warm-up and of this: engines want it
    with found.phase(f"{config.engine.num_replicas} engines start"):
        urls = stack.enter_context(engines(config, []))
    with found.phase("one question at a time"):
        if args.slow_seconds:
            add(asyncio.run(by_questions(config, urls, by_question, args.slow_seconds)))
    with found.phase("collect"):
        ours, slots_busy = collected(config, urls)
    add(ours)
    told_slots = f"slots busy {slots_busy:.1%}, {config.engine.num_replicas} engines"
    found.lines["Collecting"] += ["", *verdicts(ways), told_slots]
    write_atomically(args.out / "ways.json", json.dumps([asdict(one) | {"rate": one.rate} for one in ways]) + "\n")
    pipeline(args, found, urls, num_items=sum(map(len, by_question)))


def prepared(args: argparse.Namespace, found: Found) -> OfflineConfig:
    """The collection's configuration, its model warmed up."""
    if args.gguf:
        args.model = args.out / "model"
        with found.phase("model from its file"):
            if not (args.model / "config.json").is_file():
                folder_of_gguf(args.gguf, args.model)
    file, warm = args.out / "pipeline.yaml", args.out / "warm" if args.warm_seconds else args.model
    file.write_text(yaml.safe_dump(values(args, warm)))
    config = load_offline(file, args.overrides)
    with found.phase("warm-up"):
        if args.warm_seconds and not (warm / "config.json").is_file():
            rows = load_questions(Questions(path=args.train), seed=0, heldout=False).questions[args.questions :]
            limits = {"epochs": args.warm_epochs, "seconds": args.warm_seconds, "rate": args.warm_rate}
            facts = warm_up(args.model, list(rows), warm, prompt=config.collect.prompt, **limits)
            found.lines["Warm-up"] = [f"{name} {value}" for name, value in facts.items()]
    own = config.run.model_copy(update={"dir": str(args.out / "collected"), "seed": config.run.seed + 1})
    return config.model_copy(update={"run": own})


def values(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    share = round(ALL_ENGINES / args.engines_per_gpu, 3)
    return {
        "run": {"dir": str(args.out / "pipeline")},
        "model": {"path": str(model), "max_length": 1024, "lora": {"rank": 32, "alpha": 64}},
        "engine": {
            "num_replicas": args.engines_per_gpu,
            "max_num_seqs": 256,
            "gpu_memory_utilization": share,
            "start_timeout_seconds": args.deadline,
        },
        "bridge": {"name": "restart"},
        "collect": {"questions": {"path": args.train, "num_questions": args.questions}, "max_tokens": 320},
        "dpo": {"learning_rate": 5e-5, "num_epochs": 2, "microbatch_pairs": 16, "checkpoint_interval": 1000},
        "eval": {"sets": [{"name": "test", "path": args.test}], "max_tokens": 320, "num_samples": 4},
    }


def pipeline(args: argparse.Namespace, found: Found, urls: tuple[str, ...], *, num_items: int) -> None:
    run_dir = Path(load_offline(args.out / "pipeline.yaml", args.overrides).run.dir)
    words = [str(args.out / "pipeline.yaml"), *args.overrides]
    words += [word for url in urls for word in ("--engine-url", url)]
    found.lines["Killed"] = lines = []
    with found.phase("pipeline, until it is killed"), running(words, args.out / "pipeline-1.log") as process:
        attempts = wait_for(process, run_dir, round(args.kill_at * num_items))
        process.kill()
        process.wait()
        whole = attempts.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    num_kept = len(kept.splitlines())
    lines.append(f"SIGKILL to the pipeline with {num_kept} of {num_items} trajectories on disk")
    with found.phase("pipeline, resumed"), running(words, args.out / "pipeline-2.log") as process:
        code = process.wait()
    if manifest := read_object(attempts.with_name(MANIFEST_FILE)):
        lines += counted(kept, attempts, manifest["facts"])
    if code:
        raise RuntimeError(f"the pipeline ended with code {code}: {last_lines(args.out / 'pipeline-2.log', 5)}")
    summary: Any = read_object(run_dir / SUMMARY_FILE)
    found.lines["Before and after DPO"] = compared(run_dir, summary)


@contextmanager
def running(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        argv = [sys.executable, "-m", "syncline", "pipeline", *words]
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[bytes], run_dir: Path, num_lines: int) -> Path:
    """The file of attempts, once it has so many. Raises `RuntimeError` if the pipeline ends before."""
    while process.poll() is None:
        for path in run_dir.glob(f"collect-*/{ATTEMPTS_FILE}"):
            if path.read_bytes().count(b"\n") >= num_lines:
                return path
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the pipeline ended with code {process.returncode} before it was killed; see its log")


def counted(kept: bytes, attempts: Path, facts: dict[str, Any]) -> list[str]:
    whole = attempts.read_bytes()
    keys = [json.loads(line)["key"] for line in whole.splitlines()]
    busy = "not known" if facts["gpu_busy"] is None else f"{facts['gpu_busy']:.0%}"
    same = "byte for byte" if whole.startswith(kept) else "CHANGED"
    return [
        f"called again: {facts['resumed']} kept ({same}), {facts['sampled']} sampled, {len(keys)} in all",
        f"twice: {len(keys) - len(set(keys))}; given back by an engine and sampled again: {facts['sampled_again']}",
        f"after the kill {facts['tokens_per_second']:,.0f} tokens/s, GPU busy {busy}",
    ]


def compared(run_dir: Path, summary: dict[str, Any]) -> list[str]:
    before, after = summary["evaluations"][0], summary["evaluations"][-1]
    trained: Any = read_object(run_dir / summary["rounds"][-1]["dpo"] / MANIFEST_FILE)
    return [
        f"{trained['facts']['num_pairs']} pairs, {trained['facts']['num_steps']} steps of DPO",
        *(f"before: {line}" for line in told(before["sets"])),
        *(f"after:  {line}" for line in told(after["sets"])),
        *(told_comparison(name, one) for name, one in summary["comparisons"].items()),
    ]


def _out_of_time(*_: object) -> None:
    raise OutOfTime("the deadline")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--gguf", type=Path, help="a quantised file; needs the package gguf")
    model.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--train", required=True, help="GSM8K's training rows, JSON lines of question and answer")
    parser.add_argument("--test", required=True, help="its test rows")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--deadline", type=float, default=480, help="seconds")
    parser.add_argument("--questions", type=int, default=500, help="collected from; the others are for the warm-up")
    parser.add_argument("--engines-per-gpu", type=int, default=8)
    parser.add_argument("--slow-seconds", type=float, default=20, help="of each of the original's two ways")
    parser.add_argument("--warm-seconds", type=float, default=50, help="0: the model is taken as it is")
    parser.add_argument("--warm-epochs", type=int, default=3)
    parser.add_argument("--warm-rate", type=float, default=2e-4)
    parser.add_argument("--kill-at", type=float, default=0.3, help="share of the collection")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of the pipeline's configuration")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
