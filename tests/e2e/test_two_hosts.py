"""Two hosts, as two network namespaces of this machine: a learner with a rank on each, an engine on the second.

Host a: trajectory server, environment, rank 0. Host b: rank 1, and an engine that listens on b's loopback alone; a
relay stands for the `ssh -L` that brings its port to the other host. The ranks meet by torchrun's rendezvous, learner
and engine by `bridge.host`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from real_engine import make_tiny_model, run_values

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
OWN_ENVIRONMENT = Path(__file__).parents[2] / "benchmarks"
"""Its rewards differ in every group, so that every step moves the weights."""
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
NUM_STEPS = 3
RELAY = """
import asyncio, sys

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def relay(reader, writer):
    other, back = await asyncio.open_connection("127.0.0.1", int(sys.argv[3]))
    await asyncio.gather(copy(reader, back), copy(other, writer), return_exceptions=True)

async def main():
    server = await asyncio.start_server(relay, sys.argv[1], int(sys.argv[2]))
    await server.serve_forever()

asyncio.run(main())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A network namespace with one address that the other one reaches, and a loopback of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.address, self._folder = f"syncline-{os.getpid()}-{name}", ADDRESSES[name], folder
        ip("netns", "add", self.name)

    def bring_up(self, link: str) -> None:
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", link)
        for one in (link, "lo"):
            ip("-n", self.name, "link", "set", one, "up")

    @contextmanager
    def running(self, what: str, *words: str, **environment: str) -> Iterator[subprocess.Popen]:
        """A process of this host, ended by pid; its output is in `what`.txt."""
        command = ["ip", "netns", "exec", self.name, sys.executable, *words]
        with (self._folder / f"{what}.txt").open("w") as log:
            env = {**os.environ, **environment}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def close(self) -> None:
        ip("netns", "delete", self.name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        try:
            made = [Host(name, tmp_path) for name in ADDRESSES if shutil.which("ip") or pytest.skip("needs iproute2")]
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
        for host in made:
            stack.callback(host.close)
        first, second = (("netns", host.name) for host in made)
        ip("link", "add", "link0", *first, "type", "veth", "peer", "name", "link0", *second)
        for host in made:
            host.bring_up("link0")
        yield made[0], made[1]


def test_a_learner_of_two_hosts_trains_with_an_engine_of_the_second(
    hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(OWN_ENVIRONMENT), os.environ.get("PYTHONPATH", "")]))
    here, there = hosts
    values = run_values(make_tiny_model(tmp_path / "model"), tmp_path / "run")
    values["run"] |= {"num_steps": NUM_STEPS, "groups_per_step": 2, "rollouts_per_group": 2}
    values["environments"] = [{"task": "even_tokens:EvenTokens", "name": "even"}]
    values["engine"] |= {"device": "cpu"}
    values["learner"] = {"device": "cpu", "tensor_parallel_size": 2, "token_budget": 512}
    values["bridge"] = {"name": "broadcast", "host": here.address}
    file = str(tmp_path / "run.yaml")
    Path(file).write_text(yaml.safe_dump(values))
    syncline = ("-m", "syncline")
    urls = ("--engine-url", f"http://{there.address}:9001", "--trajectories-url", "http://127.0.0.1:8000")
    ranks = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    ranks += ("--master-addr", here.address, "--master-port", "29400")
    with ExitStack() as stack:
        stack.enter_context(there.running("engine", *syncline, "serve", file, "--port", "9000"))
        stack.enter_context(there.running("relay", "-c", RELAY, there.address, "9001", "9000"))
        stack.enter_context(here.running("trajectories", *syncline, "trajectories", file, "--port", "8000"))
        stack.enter_context(here.running("environment", *syncline, "env", file, "--index", "0", *urls))
        both = [
            stack.enter_context(
                host.running(
                    f"rank-{rank}", *ranks, "--node-rank", str(rank), *syncline, "train", file, *urls,
                    GLOO_SOCKET_IFNAME="link0",
                )
            )
            for rank, host in enumerate(hosts)
        ]  # fmt: skip
        deadline = time.monotonic() + 300
        while any(rank.poll() is None for rank in both):
            assert time.monotonic() < deadline, _told(tmp_path)
            assert not any(rank.poll() for rank in both), _told(tmp_path)
            time.sleep(0.5)
        assert [rank.poll() for rank in both] == [0, 0], _told(tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["policy_version"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(step["sync/bytes"] > 0 for step in steps)


def _told(folder: Path) -> str:
    return "\n".join(f"{log.name}:\n{log.read_text()[-1500:]}" for log in folder.glob("*.txt"))
