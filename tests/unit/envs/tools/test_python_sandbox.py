"""A program computes and prints; every other thing it tries fails, and every limit holds. Real processes."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from syncline.envs.tools import ToolError, python_sandbox
from syncline.envs.tools.python_sandbox import Limits, PythonSandbox
from syncline.errors import ConfigError
from syncline.launch.groups import process_stat

GENEROUS = Limits(seconds=60.0, cpu_seconds=30)


def run(code: str, limits: Limits = GENEROUS) -> str:
    return asyncio.run(PythonSandbox(limits).python(code))


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(sum(range(10)))", "45"),
        ("import math, fractions\nprint(math.comb(10, 3), fractions.Fraction(6, 4))", "120 3/2"),
        ("from collections import Counter\nprint(Counter('aab').most_common(1))", "[('a', 2)]"),
        ("x = 1", "(it printed nothing)"),
        ("import sys\nprint('só')\nsys.exit(3)", "só"),
        ("def f(n):\n    return n and f(n - 1)\nprint(f(500))", "0"),
    ],
)
def test_computes(code: str, printed: str):
    assert run(code) == printed


def test_exception_is_shown_with_its_line():
    _, place, last = run("x = 1\nprint(x / 0)").splitlines()
    assert (place, last) == ('  File "<program>", line 2, in <module>', "ZeroDivisionError: division by zero")


def test_syntax_error_is_shown():
    assert "SyntaxError" in run("print(")


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd').read()",
        "open('/tmp/syncline-sandbox-escape', 'w')",
        "os.open('/proc/self/environ', os.O_RDONLY)",
        "os.listdir('/')",
        "os.unlink('/tmp/nothing')",
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getpid(), 0)",
        "os.setuid(0)",
        "os.pipe()",
        "os.dup(1)",
        "os.chdir('/')",
        "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_files_processes_and_limits_are_out_of_reach(attempt: str):
    code = f"import sys\nos, resource = sys.modules['os'], sys.modules['resource']\ntry:\n    print({attempt})\n"
    code += "except OSError as error:\n    print('refused', error.errno)\nexcept ValueError:\n    print('refused 1')"
    assert run(code) == "refused 1"


def test_network_is_out_of_reach():
    assert "Error" in run("import socket\nsocket.socket()")


@pytest.mark.parametrize("call", ["socket(2, 1, 0)", "fork()", "open(b'/etc/passwd', 0)", "syscall(41, 2, 1, 0)"])
def test_native_code_gets_no_further(call: str):
    code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call}, ctypes.get_errno())"
    assert run(code) == "-1 1"


def test_thread_cannot_be_started():
    assert "RuntimeError" in run("import threading\nthreading.Thread(target=print).start()")


def test_module_that_would_need_a_file_is_not_found():
    assert "Error" in run("import sqlite3")


def test_endless_loop_is_stopped_by_its_cpu_time():
    assert (
        run("while True: pass", Limits(seconds=60, cpu_seconds=1)) == "\nError: stopped, it used more than 1 s of CPU"
    )


def test_sleeper_is_stopped_by_the_clock_and_keeps_what_it_printed():
    told = run("import time\nprint('begun', flush=True)\ntime.sleep(1000)", Limits(seconds=2, cpu_seconds=30))
    assert told == "begun\n\nError: stopped, it was not done in 2 s"


def test_memory_is_bounded():
    assert "MemoryError" in run("x = bytearray(10**9)", Limits(seconds=60, cpu_seconds=30, memory_bytes=200 << 20))


def test_output_is_bounded_and_its_flood_stopped():
    told = run("while True: print('x' * 1000)", Limits(seconds=60, cpu_seconds=30, output_bytes=100))
    assert told == "x" * 100 + "\nError: stopped, it printed more than 100 bytes"


def test_crash_is_named():
    assert run("import ctypes\nctypes.string_at(0)") == "\nError: it ended by SIGSEGV"


def test_secrets_of_the_parent_are_not_inherited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_SECRET", "sesame")
    assert "sesame" not in run("import sys\nprint(dict(sys.modules['os'].environ))")


def test_program_that_is_too_long_is_told_to_the_model():
    with pytest.raises(ToolError, match="more than 65536 bytes"):
        run("#" * 70_000)


def test_no_child_is_left_when_the_caller_gives_up():
    async def give_up() -> None:
        sandbox = PythonSandbox(GENEROUS)
        running = asyncio.create_task(sandbox.python("import time\ntime.sleep(1000)"))
        while not children():
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(give_up())
    assert children() == []


def children() -> list[str]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in listed if "python_child" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_no_child_outlives_a_caller_that_is_killed():
    code = (
        "import asyncio\nfrom syncline.envs.tools.python_sandbox import Limits, PythonSandbox\n"
        "sandbox = PythonSandbox(Limits(seconds=600))\nprint('built', flush=True)\n"
        "asyncio.run(sandbox.python('import time; time.sleep(600)'))\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert caller.stdout and caller.stdout.readline() == b"built\n"
    deadline, child = time.monotonic() + 60, 0
    while not (child and "\nSeccomp:\t2" in Path(f"/proc/{child}/status").read_text()):
        assert time.monotonic() < deadline and caller.poll() is None
        child = int(Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text() or 0)
    caller.kill()
    caller.communicate()
    while (stat := process_stat(child)) and not stat.zombie:
        assert time.monotonic() < deadline, "it sleeps on"


def test_machine_without_confinement_is_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    child = tmp_path / "child.py"
    source = python_sandbox.CHILD.read_text().replace("platform.machine()", "'sparc'")
    child.write_text(source)
    monkeypatch.setattr(python_sandbox, "CHILD", child)
    with pytest.raises(ConfigError, match=r"tools: python cannot be confined on this machine \(KeyError: 'sparc'"):
        PythonSandbox()


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_bytes": "much"}, {"cpus": 3}])
def test_unusable_limit_is_refused_by_name(limits: dict):
    with pytest.raises(ConfigError, match=rf"sandbox.*{next(iter(limits))}"):
        PythonSandbox.from_config(limits)
