"""Runs a model's Python in a process that can compute and print, and nothing else.

The child (`python_child.py`) imports a part of the standard library, then gives up everything for good, by rlimits and
a seccomp filter of allowed system calls: no file is opened, read or written any more, no process started or signalled,
no socket made. The parent waits for its output, at most `seconds`, reads at most `output_bytes`, and kills it then.
A machine whose kernel refuses the filter is a `ConfigError` when the sandbox is built: there is no weaker one.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncline.envs.tools import ToolError
from syncline.errors import ConfigError

CHILD = Path(__file__).with_name("python_child.py")
NOT_CONFINED = 97
"""The child's exit code when it could not give up what it has; it runs nothing then."""
MAX_CODE_BYTES = 64 << 10
_PART = 4096
"""Bytes read at once; of a flood no more than a few of them are ever held."""


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: float = 5.0
    """By the clock, start-up included."""
    cpu_seconds: int = 3
    memory_bytes: int = 256 << 20
    """Of address space."""
    output_bytes: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError([f"sandbox.{name}: {value!r} must be a number above 0"])


class PythonSandbox:
    """`python(code)` is the tool. As many children at once as the machine has cores."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._cores = asyncio.Semaphore(os.cpu_count() or 1)
        _check_confinement(self._argv())

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "PythonSandbox":
        try:
            return cls(Limits(**values))
        except TypeError as error:
            raise ConfigError([f"sandbox: {error}; it takes {', '.join(Limits.__dataclass_fields__)}"]) from error

    async def python(self, code: str) -> str:
        """
        Runs a Python program and returns what it prints. The standard library's modules for computing can be imported.

        Args:
            code: The program; print what you want to see
        """
        body = code.encode(errors="replace")
        if len(body) > MAX_CODE_BYTES:
            raise ToolError(f"the program has more than {MAX_CODE_BYTES} bytes")
        async with self._cores:
            return await self._run(body)

    async def _run(self, body: bytes) -> str:
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        child = await asyncio.create_subprocess_exec(
            *self._argv(), stdin=pipe, stdout=pipe, stderr=both, env={}, cwd="/", start_new_session=True, limit=_PART
        )
        timed_out = False
        output = bytearray()
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._exchange(child, body, output)
        except TimeoutError:
            timed_out = True
        finally:
            if child.returncode is None:
                child.kill()
            if child.stdout:
                await child.stdout.read()  # asyncio sees no end of a process whose output nobody reads
            code = await child.wait()
        return self._told(bytes(output), code, timed_out)

    async def _exchange(self, child: asyncio.subprocess.Process, body: bytes, output: bytearray) -> None:
        """Gives the program, and reads until the child ends or has said more than it may."""
        assert child.stdin and child.stdout
        try:
            child.stdin.write(body)
            await child.stdin.drain()
            child.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it ended before it read; its exit code says why
        while len(output) <= self._limits.output_bytes and (part := await child.stdout.read(_PART)):
            output += part
        if len(output) <= self._limits.output_bytes:
            await child.wait()

    def _told(self, output: bytes, code: int, timed_out: bool) -> str:
        if code == NOT_CONFINED:
            raise RuntimeError(f"the Python sandbox could not be closed: {output.decode(errors='replace')}")
        limits, text = self._limits, output[: self._limits.output_bytes].decode(errors="replace")
        if len(output) > limits.output_bytes:
            return f"{text}\nError: stopped, it printed more than {limits.output_bytes} bytes"
        if timed_out:
            return f"{text}\nError: stopped, it was not done in {limits.seconds:g} s"
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"{text}\nError: stopped, it used more than {limits.cpu_seconds} s of CPU"
        if code < 0:
            return f"{text}\nError: it ended by {signal.Signals(-code).name}"
        return text.rstrip("\n") or "(it printed nothing)"

    def _argv(self) -> list[str]:
        numbers = (self._limits.cpu_seconds, self._limits.memory_bytes, os.getpid())
        return [sys.executable, "-I", "-S", str(CHILD), *map(str, numbers)]


def _check_confinement(argv: list[str]) -> None:
    try:
        answer = subprocess.run(argv, input=b"print(6 * 7)", capture_output=True, timeout=60, env={}, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError([f"tools: python cannot be started here ({error}); leave it out"]) from error
    if answer.stdout != b"42\n":
        told = (answer.stderr + answer.stdout).decode(errors="replace").strip() or f"it ended with {answer.returncode}"
        raise ConfigError([f"tools: python cannot be confined on this machine ({told}); leave it out of tools"])
