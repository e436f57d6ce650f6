"""The engines a stage samples from, started and stopped by it: replicas on GPUs of their own.

Unlike a run's processes these may die: the sampler notices and gives their work to the others. The kernel kills them
with this process (`launch.tether`), however it ends, and a guardian stops what they leave behind.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from syncline.config import RunConfig
from syncline.errors import EngineTimeout, ProcessDied
from syncline.launch.child import Child, Exited
from syncline.launch.groups import subreaper
from syncline.launch.guardian import DONE
from syncline.launch.plan import Machine, ProcessSpec, plan_servers, wanted_engine_ports
from syncline.launch.ports import lease_ports
from syncline.launch.supervisor import HEALTH_SECONDS, LAST_LINES, answers
from syncline.observe.files import CONFIG_FILE, PROCESSES_FILE, last_lines, write_atomically

GRACE_SECONDS = 10.0


@contextmanager
def running_engines(
    run: RunConfig, *, machine: Machine | None = None, show: Callable[[str], None] = print
) -> Iterator[tuple[str, ...]]:
    """The URLs of `engine.num_replicas` engines, ready; they log below `run.dir`, and end with the body. `machine`:
    with the GPUs that `engine.devices` counts, for a process that sees its own alone by now.

    Call it on the main thread: they are tied to the thread's life. Raises `ConfigError` for GPUs and ports that are not
    there, `ProcessDied` and `EngineTimeout` with the end of the log.
    """
    folder = Path(run.run.dir)
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(run.model_dump(mode="json")))
    with ExitStack() as stack:
        ports = stack.enter_context(lease_ports(wanted_engine_ports(run)))
        specs = plan_servers(run, ports=ports, machine=machine or Machine.here(), folder=folder)
        stack.enter_context(subreaper())
        write_atomically(folder / PROCESSES_FILE, json.dumps({"processes": []}))
        stack.callback(_guardian(folder).communicate, DONE)
        children, ends = list[Child](), list[Exited]()
        stack.callback(_stop_at_once, children)
        for spec in specs:
            children.append(child := Child(spec, on_exit=ends.append))
            write_atomically(folder / PROCESSES_FILE, json.dumps({"processes": [c.record() for c in children]}))
            show(f"started {spec.name} (pid {child.pid}), log {spec.log}")
        for child in children:
            _wait_until_ready(child, ends)
        show(f"{len(children)} engines are ready after {max(child.seconds for child in children):.0f} s")
        yield tuple(_url(spec) for spec in specs)


def _stop_at_once(children: Sequence[Child]) -> None:
    with ThreadPoolExecutor(max(1, len(children))) as threads:
        list(threads.map(lambda child: child.stop(grace_seconds=GRACE_SECONDS), children))


def _wait_until_ready(child: Child, ends: Sequence[Exited]) -> None:
    ready = child.spec.ready
    assert ready is not None
    while not answers(ready.url):
        for end in ends:
            raise ProcessDied(f"{end.name} {end.told()} before it was ready; {_end_of_log(child, end.name)}")
        if child.seconds > ready.timeout_seconds:
            who = f"{child.spec.name} (pid {child.pid}) did not answer within {ready.timeout_seconds:g} s"
            raise EngineTimeout(f"{who}; {ready.remedy}; {_end_of_log(child, child.spec.name)}")
        time.sleep(HEALTH_SECONDS)


def _end_of_log(child: Child, name: str) -> str:
    log = child.spec.log.with_name(f"{name}.log")
    return f"its log {log} ends with:" + "".join(f"\n  | {line}" for line in last_lines(log, LAST_LINES))


def _url(spec: ProcessSpec) -> str:
    assert spec.ready is not None
    return spec.ready.url.removesuffix("/health")


def _guardian(folder: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "syncline.launch.guardian", str(folder / PROCESSES_FILE)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
