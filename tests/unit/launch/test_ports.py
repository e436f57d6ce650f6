"""Port leases: exclusive, usable by the run's own server, refused by name when a stranger has the port."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from syncline.errors import ConfigError
from syncline.launch.ports import lease_ports, port_holder

HOST = "127.0.0.1"


def server(port: int) -> socket.socket:
    """Binds and listens as uvicorn and vLLM do."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((HOST, port))
    listening.listen()
    return listening


def test_free_ports_differ(tmp_path: Path) -> None:
    with lease_ports({"a": (HOST, 0), "b": (HOST, 0)}, folder=tmp_path) as first:
        with lease_ports({"a": (HOST, 0), "b": (HOST, 0)}, folder=tmp_path) as second:
            assert len({*first.values(), *second.values()}) == 4
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [], "locks go with their leases"


def test_the_runs_server_may_bind_again_and_again(tmp_path: Path) -> None:
    with lease_ports({"a": (HOST, 0)}, folder=tmp_path) as ports:
        for _ in range(2):
            with server(ports["a"]), socket.create_connection((HOST, ports["a"])):
                pass


def test_nobody_else_is_given_a_leased_port(tmp_path: Path) -> None:
    with (
        lease_ports({"a": (HOST, 0)}, folder=tmp_path) as ports,
        socket.socket() as other,
        pytest.raises(OSError, match="in use"),
    ):
        other.bind((HOST, ports["a"]))


def test_two_runs_cannot_name_the_same_port(tmp_path: Path) -> None:
    with lease_ports({"engine.port": (HOST, 0)}, folder=tmp_path) as ports:
        fixed = ports["engine.port"]
        with (
            pytest.raises(ConfigError, match=rf"^engine.port: {fixed} .* leased by another run \(pid {os.getpid()}\)"),
            lease_ports({"engine.port": (HOST, fixed)}, folder=tmp_path),
        ):
            pass
    with lease_ports({"engine.port": (HOST, fixed)}, folder=tmp_path) as again:
        assert again == {"engine.port": fixed}, "released with the first run"


def test_strangers_are_named_all_at_once_and_left_alone(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "held = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]\n"
        "print(*(s.getsockname()[1] for s in held), flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        first, second = (int(port) for port in stranger.stdout.readline().split())
        wanted = {"engine.port": (HOST, first), "trajectory.port": (HOST, second), "free": (HOST, 0)}
        with pytest.raises(ConfigError) as refused, lease_ports(wanted, folder=tmp_path):
            pass
        assert [fault.split(" ")[:2] for fault in refused.value.faults] == [
            ["engine.port:", str(first)], ["trajectory.port:", str(second)]
        ]  # fmt: skip
        assert all(f"pid {stranger.pid} (" in fault for fault in refused.value.faults)
        assert all("to 0 for a free one" in fault for fault in refused.value.faults)
        assert list(tmp_path.iterdir()) == [], "nothing is kept of a refused lease"
        assert stranger.poll() is None
        assert stranger.stdin is not None
        stranger.stdin.close()


def test_an_unheld_port_has_no_named_holder() -> None:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        assert port_holder(bound.getsockname()[1]) == "another process"


def test_a_holder_whose_name_is_cut_inside_a_character_is_named() -> None:
    code = (
        "import socket, sys\n"
        "open('/proc/self/comm', 'wb').write('тренировка'.encode())\n"
        "held = socket.create_server(('127.0.0.1', 0)); print(held.getsockname()[1], flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert port_holder(int(holder.stdout.readline())) == f"pid {holder.pid} (трениро\ufffd)"
        assert holder.stdin is not None
        holder.stdin.close()


def test_a_swept_temporary_folder_does_not_spoil_the_end_of_a_run(tmp_path: Path) -> None:
    with lease_ports({"engine.port": (HOST, 0)}, folder=tmp_path):
        for path in tmp_path.iterdir():
            path.unlink()
