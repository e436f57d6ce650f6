"""Ports of a run, leased so that nobody else gets them while the run lasts.

A lease is a socket bound to the port, never listening, with SO_REUSEADDR: the kernel gives the port to nobody who
asks for any, yet the run's own server (which sets SO_REUSEADDR too, as uvicorn and vLLM do) can bind and listen beside
it, and again after it restarts. A locked file per port tells apart two runs that name the same port. The kernel
drops both when the process ends, however it ends. A stranger's port is refused by name; the stranger is left alone.
"""

import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from syncline.errors import ConfigError

_LISTENING = "0A"
_FREE_PORT_TRIES = 50


@contextmanager
def lease_ports(wanted: Mapping[str, tuple[str, int]], *, folder: Path | None = None) -> Iterator[dict[str, int]]:
    """Field → (host, port) to field → leased port; port 0 takes a free one. `folder` holds the locks.

    Raises `ConfigError` naming every field whose port is taken, the port, and its holder where the kernel tells.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"syncline-ports-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    ports: dict[str, int] = {}
    with ExitStack() as stack:
        for field, (host, port) in sorted(wanted.items(), key=lambda item: item[1][1] == 0):
            try:
                ports[field] = _lease(stack, folder, host=host, port=port)
            except _Taken as taken:
                faults.append(
                    f"{field}: {port} on {host} is {taken}; stop that yourself, or set {field} to 0 for a free one"
                )
        if faults:
            raise ConfigError(faults)
        yield {field: ports[field] for field in wanted}


class _Taken(Exception):
    """Who has the port, as the end of a sentence."""


def _lease(stack: ExitStack, folder: Path, *, host: str, port: int) -> int:
    for _ in range(_FREE_PORT_TRIES):
        with ExitStack() as attempt:
            bound = attempt.enter_context(_bind(host, port))
            number = bound.getsockname()[1]
            holder = _lock(attempt, folder / f"{number}.json")
            if holder is None:
                stack.enter_context(attempt.pop_all())
                return number
            if port != 0:
                raise _Taken(f"leased by another run ({holder})")
    raise _Taken(f"not to be had: {_FREE_PORT_TRIES} free ports in a row are leased by other runs")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise _Taken(f"not to be had, because the host is unknown ({error.strerror})") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _Taken(f"held by {port_holder(port)} ({error.strerror})") from error
    return bound


def refuse_taken(field: str, host: str, port: int) -> None:
    """Raises `ConfigError` naming the holder when somebody listens on the port; a lease on it is no obstacle."""
    try:
        _bind(host, port).close()
    except _Taken as taken:
        raise ConfigError([f"{field}: {port} on {host} is {taken}; stop that yourself, or name another"]) from taken


def _lock(stack: ExitStack, path: Path) -> str | None:
    """Locks `path` until the stack closes and removes it then; the holder, where another process has it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            return f"pid {json.loads(holder)['pid']}" if holder else "of an unknown pid"
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid()}))
    file.flush()
    stack.callback(file.close)
    stack.callback(path.unlink, missing_ok=True)  # temporary folders are swept while a run goes on for weeks
    return None


def port_holder(port: int) -> str:
    """Who listens on a TCP port: `pid 42 (nginx)`, as far as this user may see."""
    inodes = _listening_inodes(port)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {os.readlink(fd) for fd in (process / "fd").iterdir()}
            if held & inodes:
                return f"pid {process.name} ({(process / 'comm').read_text(errors='replace').strip()})"
        except OSError:  # it ended while we looked, or belongs to another user
            continue
    return "another process"


def _listening_inodes(port: int) -> set[str]:
    inodes: set[str] = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for columns in (line.split() for line in lines):
            if columns[3] == _LISTENING and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    return inodes
