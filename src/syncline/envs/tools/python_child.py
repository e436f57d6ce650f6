"""The sandbox's child: reads a program, gives up everything but computing and printing, runs it. Never imported.

The seccomp filter lets through the system calls below and answers all others with EPERM, in every thread, for good:
even native code reached through `ctypes` cannot open, connect, fork, signal or raise its own limits.
"""

import ctypes
import importlib
import io
import os
import platform
import resource
import signal
import sys
import traceback

MODULES = """
abc array ast base64 binascii bisect builtins calendar cmath codecs collections collections.abc contextlib copy
dataclasses datetime decimal difflib enum fractions functools hashlib heapq io itertools json json.decoder json.encoder
keyword locale math numbers operator pprint queue random re string statistics struct sys textwrap time timeit traceback
types typing unicodedata warnings zlib zoneinfo
"""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED = {
    "x86_64": "0 1 3 5 8 9 10 11 12 13 14 15 24 25 28 35 39 60 96 131 186 202 219 228 229 230 231 318",
    "aarch64": "57 62 63 64 80 93 94 98 101 113 114 115 124 128 132 134 135 139 169 172 178 214 215 216 222 226 "
    "233 278",
}
"""By each machine's numbers: read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
rt_sigreturn sched_yield mremap madvise nanosleep getpid exit gettimeofday sigaltstack gettid futex restart_syscall
clock_gettime clock_getres clock_nanosleep exit_group getrandom."""
NOT_CONFINED = 97
EPERM = 1
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def end_with(parent: int) -> None:
    """A sleeping program would outlive a parent that was killed: no limit of its own ends it, and no group holds it."""
    call(ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        raise OSError(0, "the caller has ended")


def confine(cpu_seconds: int, memory_bytes: int) -> None:
    """Raises `OSError` or `KeyError` when this machine does not allow it."""
    wanted = {"CPU": cpu_seconds, "AS": memory_bytes, "FSIZE": 0, "NPROC": 0, "NOFILE": 0, "CORE": 0}
    for name, limit in wanted.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    instructions = seccomp_filter(platform.machine())
    program = Program(len(instructions), (Instruction * len(instructions))(*instructions))
    call(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def seccomp_filter(machine: str) -> list[Instruction]:
    allowed = [int(number) for number in ALLOWED[machine].split()]
    checks = [Instruction(JUMP_IF_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    return [
        Instruction(LOAD, 0, 0, 4),  # seccomp_data.arch
        Instruction(JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        Instruction(RETURN, 0, 0, KILL_PROCESS),
        Instruction(LOAD, 0, 0, 0),  # seccomp_data.nr
        *checks,
        Instruction(RETURN, 0, 0, ERRNO | EPERM),
        Instruction(RETURN, 0, 0, ALLOW),
    ]


def call(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


def main() -> int:
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", errors="backslashreplace")
    try:
        end_with(int(sys.argv[3]))
        for name in MODULES.split():
            importlib.import_module(name)
        code = sys.stdin.buffer.read().decode(errors="replace")
        confine(int(sys.argv[1]), int(sys.argv[2]))
    except (OSError, KeyError, ValueError) as error:
        print(f"{type(error).__name__}: {error} ({platform.machine()})")
        return NOT_CONFINED
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        return 0
    except BaseException as error:  # the program's own, shown as Python shows it
        del code
        traceback.print_exception(type(error), error, error.__traceback__.tb_next if error.__traceback__ else None)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
