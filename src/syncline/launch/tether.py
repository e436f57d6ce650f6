"""Runs in a new process before its real command: ties its life to the supervisor's, then becomes the command.

`python -I -S tether.py SUPERVISOR_PID COMMAND …`. The kernel kills it when the supervisor dies, however that dies
(PR_SET_PDEATHSIG survives exec). Done here, not in a `preexec_fn`, which may deadlock in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(supervisor):
        sys.exit("the supervisor died before this process started")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
