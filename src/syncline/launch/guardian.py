"""Stops what a killed supervisor leaves behind: the children of its children, which the kernel does not tie to it.

The supervisor holds the other end of this process's stdin. It writes one word when it is done; a closed pipe without
the word means it died, and then every group in `processes.json` is stopped. The run folder's lock is inherited, so no
new run gets the folder before all of that is over.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from syncline.launch.groups import stop_group

DONE = b"done"
GRACE_SECONDS = 2.0


def main() -> None:
    processes = Path(sys.argv[1])
    if sys.stdin.buffer.read() == DONE:
        return
    with ExitStack() as stops:  # in reverse, each even if another could not be stopped
        for process in json.loads(processes.read_text())["processes"]:
            stops.callback(stop_group, process["pid"], process["start_time"], grace_seconds=GRACE_SECONDS)


if __name__ == "__main__":
    main()
