"""How engines that sample from one copy of the weights meet while vLLM starts, before any of them serves.

Who produces: the owner, by files that its port names: at its start who it is (`owning`), and from each rank, once its
weights lie where they stay and before anything is compiled or captured, where (`tell`). Who waits: the loader of an
engine that attaches, in its worker (`told`), with all done that needs no weights. Who unblocks: the rank's file, the
end of the owner's process, or the deadline. What an owner left that was killed says nothing: that process is gone.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any
from urllib.parse import urlsplit

from syncline.bridges.handles import export_views, move_to_memory_file, process_start
from syncline.bridges.receipt import whole
from syncline.engines.vllm import compat
from syncline.errors import EngineGone, EngineTimeout
from syncline.observe.files import write_atomically

POLL_SECONDS = 0.1


@contextmanager
def owning(port: int) -> Iterator[None]:
    """This process, which serves at `port`, owns weights that others may attach to."""
    folder = _folder(port)
    rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)  # nobody else's, who could have engines open memory of theirs
    write_atomically(folder / "owner.json", json.dumps([os.getpid(), process_start(os.getpid())]))
    try:
        yield
    finally:
        rmtree(folder, ignore_errors=True)


def tell(model: Any, *, port: int, rank: int) -> None:
    """Where this rank's parameters lie, under vLLM's own names; on a CPU they move, in place, into a memory file."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    memory_file = model.syncline_memory_file = move_to_memory_file(model.parameters()) if on_cpu else None
    named = ((name, whole(parameter)) for name, parameter in model.named_parameters())
    exported = export_views(named, memory_file=memory_file, vllm_version=compat.vllm_version())
    write_atomically(_folder(port) / f"rank-{rank}.json", json.dumps(exported))


def told(url: str, *, rank: int, timeout_seconds: float, sleep: Callable[[float], None] = time.sleep) -> Mapping:
    """What the owner at `url` told of its rank, as `handles.export_views` has it. Raises `EngineGone` as soon as an
    owner that was there is not, and `EngineTimeout` when none has told in time."""
    folder, who, was_there = _folder(urlsplit(url).port or 80), f"engine at {url} that owns the weights", False
    for _ in range(int(timeout_seconds / POLL_SECONDS) + 1):
        pid, started = _read(folder / "owner.json") or (0, 0)
        if is_there := started == process_start(pid):
            if exported := _read(folder / f"rank-{rank}.json"):
                return exported
        elif was_there:
            raise EngineGone(f"{who} ended before it had loaded them; see what its log ends with")
        was_there = is_there
        sleep(POLL_SECONDS)
    raise EngineTimeout(f"{who} was not ready in {timeout_seconds:g} s; raise engine.start_timeout_seconds")


def _read(path: Path) -> Any:
    with suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return None


def _folder(port: int) -> Path:
    return Path(tempfile.gettempdir()) / f"syncline-weights-{os.getuid()}-{port}"
