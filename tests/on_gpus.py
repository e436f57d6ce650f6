"""Spreads the tests that real GPUs are for over the GPUs of this machine, and always ends with one table.

python tests/on_gpus.py [--list] [--jobs restart,families] [--share 3] [--deadline 540] [--out runs/gpu-test]

A job is one pytest process with GPUs of its own (`CUDA_VISIBLE_DEVICES`), its own log and its own deadline; of one that
fails, what its engines logged last is kept beside it. Who waits: this process, polling. Who unblocks: a job's end, its
deadline, that of the whole, or Ctrl-C; what then still runs is interrupted, so that its fixtures end their engines, and
killed by pid after a grace. A job's processes are known by a variable that they inherit, wherever they went; no other
process is ever touched.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_jobs import Job, known_jobs
from outcomes import COUNTED, chaos_rows, contract_rows, table

ROOT = Path(__file__).parents[1]
MARK = "SYNCLINE_TEST_JOB"
FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
"""Each process would take all cores, and twenty jobs share them."""
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2
MESSAGE_WIDTH = 110
LOG_CHARACTERS = 60_000


class Places:
    """The GPUs, each of which `share` jobs may use at a time."""

    def __init__(self, gpus: Sequence[str], share: int) -> None:
        self.free = dict.fromkeys(gpus, share)
        self._share = share

    def take(self, job: Job) -> list[str] | None:
        """The emptiest GPUs; `None` while there are not that many with a place, or without another job."""
        wanted = self._wanted(job)
        emptiest = sorted((g for g, places in self.free.items() if places >= wanted), key=lambda gpu: -self.free[gpu])
        if len(emptiest) < job.num_gpus:
            return None
        for gpu in emptiest[: job.num_gpus]:
            self.free[gpu] -= wanted
        return emptiest[: job.num_gpus]

    def give_back(self, job: Job, gpus: Iterable[str]) -> None:
        for gpu in gpus:
            self.free[gpu] += self._wanted(job)

    def _wanted(self, job: Job) -> int:
        return self._share if job.alone else 1


@dataclass(slots=True)
class Attempt:
    """A job that was started: its process, and how it ended."""

    job: Job
    gpus: list[str]
    out: Path
    scratch: Path
    mark: str
    started: float
    process: subprocess.Popen[bytes]
    verdict: str = ""
    seconds: float = 0.0

    @classmethod
    def start(cls, job: Job, gpus: list[str], out: Path, caches: Path) -> "Attempt":
        name = job.file_name
        mark = f"{os.getpid()}-{name}"
        own = FEW_THREADS | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "VLLM_CACHE_ROOT": str(caches / name), MARK: mark}
        scratch = caches / f"{name}-tmp"
        argv = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--outcomes", str(out / f"{name}.jsonl")]
        argv += ["--basetemp", str(scratch)]
        (out / f"{name}.jsonl").unlink(missing_ok=True)
        with (out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*argv, *job.arguments],
                cwd=ROOT,
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(job, gpus, out, scratch, mark, time.monotonic(), process)

    def outcomes(self) -> list[dict]:
        """Of the tests that have ended so far."""
        file = self.out / f"{self.job.file_name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def end(self, verdict: str) -> None:
        self.verdict, self.seconds = verdict, time.monotonic() - self.started

    def keep_logs(self) -> None:
        """What the processes of its tests said last; their own folders go with this process."""
        with (self.out / f"{self.job.file_name}.processes.log").open("w") as kept:
            for log in sorted(self.scratch.rglob("*.log")):
                text = log.read_text(errors="replace")[-LOG_CHARACTERS:]
                kept.write(f"--- {log.relative_to(self.scratch)}\n{text}\n")

    def row(self) -> list[str]:
        counts = Counter(line["outcome"] for line in self.outcomes())
        where = f"{self.job.num_gpus} ({','.join(self.gpus)})"
        numbers = [str(counts[kind]) for kind in COUNTED]
        return [self.job.name, where, f"{self.seconds:.0f}", self.verdict, *numbers, self._first_fault()]

    def _first_fault(self) -> str:
        """Of a pytest that ended badly without a failed test, what it said last."""
        failed = (line for line in self.outcomes() if line["outcome"] == "failed")
        fault = next((f"{line['test'].rpartition('::')[2]}: {line['message']}" for line in failed), "")
        if not fault and self.verdict.startswith("exit"):
            fault = (self.out / f"{self.job.file_name}.log").read_text(errors="replace").strip().rpartition("\n")[2]
        return fault.replace("|", "/")[:MESSAGE_WIDTH]


@dataclass(slots=True)
class Session:
    """Starts jobs where there is a place, in the order given, and ends each at its deadline."""

    places: Places
    out: Path
    caches: Path
    job_seconds: float
    waiting: list[Job]
    running: list[Attempt] = field(default_factory=list)
    ended: list[Attempt] = field(default_factory=list)

    def run(self, deadline: float) -> None:
        while (self.waiting or self.running) and time.monotonic() < deadline:
            self._start_those_with_a_place()
            late = [a for a in self.running if time.monotonic() - a.started > self.job_seconds]
            self._stop(late, f"stopped: its {self.job_seconds:g} s were over")
            for attempt in [a for a in self.running if a.process.poll() is not None]:
                kill({attempt.mark})
                self._end(attempt, "ok" if attempt.process.returncode == 0 else f"exit {attempt.process.returncode}")
            time.sleep(POLL_SECONDS)

    def _start_those_with_a_place(self) -> None:
        for job in list(self.waiting):
            if gpus := self.places.take(job):
                self.waiting.remove(job)
                self.running.append(Attempt.start(job, gpus, self.out, self.caches))

    def stop_all(self, verdict: str) -> None:
        self._stop(list(self.running), verdict)

    def _stop(self, attempts: list[Attempt], verdict: str) -> None:
        """First an interrupt, which lets fixtures end their engines; after the grace, whatever inherited the mark."""
        for attempt in attempts:
            with suppress(ProcessLookupError):
                attempt.process.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE_SECONDS
        while any(a.process.poll() is None for a in attempts) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        kill({attempt.mark for attempt in attempts})
        for attempt in attempts:
            attempt.process.wait(GRACE_SECONDS)
            self._end(attempt, verdict)

    def _end(self, attempt: Attempt, verdict: str) -> None:
        attempt.end(verdict)
        if verdict != "ok":
            attempt.keep_logs()
        self.running.remove(attempt)
        self.ended.append(attempt)
        self.places.give_back(attempt.job, attempt.gpus)
        name, gpus, seconds, verdict, passed, failed, skipped, fault = attempt.row()
        counts = f"{passed} passed, {failed} failed, {skipped} skipped"
        print(f"{name} on {gpus}: {verdict} after {seconds} s, {counts}. {fault}", flush=True)

    def report(self) -> str:
        """The table of jobs, those without a result too, and the tables of contracts and chaos."""
        head = ["job", "GPUs", "seconds", "end", *COUNTED, "first failure"]
        rows = [attempt.row() for attempt in self.ended]
        rows += [[job.name, str(job.num_gpus), "", "not started", "", "", "", ""] for job in self.waiting]
        lines = [line for attempt in self.ended for line in attempt.outcomes()]
        (self.out / "outcomes.json").write_text(json.dumps(lines, indent=1))
        tables = [[head, *rows], contract_rows(lines), chaos_rows(lines)]
        return "\n\n".join(table(rows) for rows in tables if len(rows) > 1)

    def passed(self) -> bool:
        return not self.waiting and all(attempt.verdict == "ok" for attempt in self.ended)


def marked(marks: set[str]) -> list[int]:
    """Pids of the processes that inherited one of these marks."""
    wanted = {f"{MARK}={mark}".encode() for mark in marks}
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted & set(entry.read_bytes().split(b"\0")):
                found.append(int(entry.parent.name))
    return found


def kill(marks: set[str]) -> None:
    """Every process with one of these marks, until there is none; a process on a GPU takes a while to go."""
    until = time.monotonic() + GRACE_SECONDS
    while (pids := marked(marks)) and time.monotonic() < until:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def visible_gpus() -> list[str]:
    """As CUDA names them here; `CUDA_VISIBLE_DEVICES` narrows them."""
    from syncline.launch.plan import Machine

    return list(Machine.here().gpus)


def _interrupt(*_: object) -> None:
    """The first word to end is heard, the next are not: the table is printed all the same."""
    for word in (signal.SIGINT, signal.SIGTERM):
        signal.signal(word, signal.SIG_IGN)
    raise KeyboardInterrupt


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="the jobs and their GPUs; runs none")
    parser.add_argument("--jobs", default="", help="run only jobs whose name contains one of these, a,b")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=GPUS:ARGUMENTS", help="a job of your own")
    parser.add_argument("--gpus", help="names for CUDA_VISIBLE_DEVICES, 0,1; default: those of this machine")
    parser.add_argument("--share", type=int, default=3, help="jobs that may use one GPU at a time (default 3)")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds for all jobs together (default 540)")
    parser.add_argument("--job-deadline", type=float, default=480.0, help="seconds for each job (default 480)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-test", help="folder of logs and outcomes")
    return parser.parse_args()


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """Those first that take the most of the GPUs' time; last those that want GPUs to themselves, or the others' would
    stand empty for them."""
    words = [word for word in args.jobs.split(",") if word]
    jobs = [job for job in known_jobs() if not words or any(word in job.name for word in words)]
    for text in args.add:
        name, _, rest = text.partition("=")
        num_gpus, _, line = rest.partition(":")
        jobs.append(Job(name, int(num_gpus), tuple(line.split())))
    return sorted(jobs, key=lambda job: (job.alone, -job.num_gpus * job.seconds))


def main() -> int:
    args = arguments()
    jobs = chosen_jobs(args)
    if args.list:
        rows = [[j.name, str(j.num_gpus), str(j.seconds), " ".join(j.arguments)] for j in jobs]
        print(table([["job", "GPUs", "seconds, about", "pytest"], *rows]))
        total = sum(job.seconds * job.num_gpus for job in jobs)
        print(f"\n{total} seconds of a place on a GPU, of which each has {args.share}")
        return 0
    gpus = args.gpus.split(",") if args.gpus else visible_gpus()
    for job in (job for job in jobs if job.num_gpus > len(gpus)):
        print(f"{job.name} needs {job.num_gpus} GPUs, and there are {len(gpus)}: left out", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for word in (signal.SIGINT, signal.SIGTERM):  # set, so that jobs heed them even when this is in the background
        signal.signal(word, _interrupt)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        fitting = [job for job in jobs if job.num_gpus <= len(gpus)]
        session = Session(Places(gpus, args.share), args.out.resolve(), Path(caches), args.job_deadline, fitting)
        try:
            session.run(started + args.deadline)
            session.stop_all("stopped: the time for all was over")
        except KeyboardInterrupt:
            session.stop_all("interrupted")
    print(f"\n{session.report()}\n\n{time.monotonic() - started:.0f} s; logs in {args.out}", flush=True)
    return 0 if session.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
