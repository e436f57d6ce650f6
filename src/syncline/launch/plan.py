"""A run's configuration → its processes, as plain values: nothing is started, opened or asked here.

    trajectories ──┐
    engine ────────┼─▶ evaluation-before ─▶ env:* and learner ─▶ evaluation-after
                   └─ (without evaluation everything starts at once; clients wait for servers by themselves)

The evaluation before training comes before the learner starts, because the learner's first act is to publish.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from syncline.config.rules import gpus_held_twice
from syncline.config.schema import RunConfig, Server
from syncline.config.servers import all_devices, num_stages, servers
from syncline.errors import ConfigError, EngineTimeout, SynclineError, TrajectoryError
from syncline.observe.files import AFTER_FILE, BEFORE_FILE, CONFIG_FILE
from syncline.observe.logs import log_path

TRAJECTORIES_START_SECONDS = 60.0


class Kind(StrEnum):
    SERVICE = "service"
    """Runs until it is stopped; ending by itself is dying."""
    JOB = "job"
    """Ends by itself, with 0; the run is over when every job has."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process is ready once `url` answers 200; `error` is raised, with `remedy`, when it has not in time."""

    url: str
    timeout_seconds: float
    error: type[SynclineError]
    remedy: str


@dataclass(frozen=True, slots=True)
class Pool:
    """Services of which some may die: while `min_alive` of `names` live, one that dies is started again, at most
    `max_restarts` times."""

    names: tuple[str, ...]
    min_alive: int
    max_restarts: int


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of a run. `env` is added to the supervisor's own environment."""

    name: str
    argv: tuple[str, ...]
    kind: Kind
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Ready | None = None
    """`None`: ready as soon as it runs."""
    devices: tuple[str, ...] = ()
    """GPUs it sees, as CUDA names them; empty: the CPU."""
    ports: tuple[int, ...] = ()
    starts_after: tuple[str, ...] = ()
    """Services that must be ready and jobs that must be done before this one starts."""
    ends_with: str | None = None
    """The job whose end ends this service; `None`: the end of the run."""
    creates: Path | None = None
    """A job whose file is there already is done already."""
    pool: Pool | None = None
    """Whose service this is that may die; `None`: its death ends the run."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan must know of the host: CPU cores this process may use, and the GPUs it sees."""

    num_cores: int
    gpus: tuple[str, ...]
    python: str = sys.executable

    @classmethod
    def here(cls) -> "Machine":
        """Asks the kernel, not torch. `CUDA_VISIBLE_DEVICES` narrows the GPUs, as it does for CUDA."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
        names = found if visible is None else [name for name in visible.split(",") if name not in ("", "-1")]
        return cls(num_cores=len(os.sched_getaffinity(0)), gpus=tuple(names))


def see_only(field: str, devices: Sequence[int], *, device: str) -> None:
    """Hides the other GPUs from CUDA, which must not have looked yet, as a run does for each of its processes. One that
    sees no more than are named was started with its own. Raises `ConfigError` for GPUs not there."""
    gpus = Machine.here().gpus
    if device == "cpu" or len(gpus) <= len(devices):
        return
    if max(devices) >= len(gpus):
        fault = f"{list(devices)} is not among the {len(gpus)} GPUs that are visible; use indices below {len(gpus)}"
        raise ConfigError([f"{field}: {fault}"])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index] for index in devices)


def wanted_ports(config: RunConfig) -> dict[str, tuple[str, int]]:
    """Field → (host, port or 0) of every port the run listens on."""
    return wanted_engine_ports(config) | {"trajectory.port": (config.trajectory.host, config.trajectory.port)}


def wanted_engine_ports(config: RunConfig) -> dict[str, tuple[str, int]]:
    """Of the engines that are started here."""
    return {
        _port_field(i): (config.engine.host, config.engine.port and config.engine.port + i)
        for i, server in enumerate(servers(config))
        if server.url is None
    }


def _port_field(replica: int) -> str:
    return f"engine.port + {replica}" if replica else "engine.port"


def plan_servers(
    config: RunConfig, *, ports: Mapping[str, int], machine: Machine, folder: Path
) -> tuple[ProcessSpec, ...]:
    """The engines alone, in a folder of their own, for a learner that is started apart. Raises `ConfigError` for GPUs
    not there."""
    return _Planner(config, ports, machine, sections=("engine",), folder=folder).engines()


def plan(config: RunConfig, *, ports: Mapping[str, int], machine: Machine) -> tuple[ProcessSpec, ...]:
    """The processes in the order they start; they stop in the reverse. Raises `ConfigError` for GPUs not there."""
    planner = _Planner(config, ports, machine)
    evaluated = config.evaluation.num_tasks > 0
    before = ("evaluation-before",) if evaluated else ()
    return (
        planner.trajectories(),
        *planner.engines(),
        *([planner.evaluation("evaluation-before", BEFORE_FILE, after="engine")] if evaluated else []),
        *(planner.environment(i, starts_after=before) for i in range(len(config.environments))),
        planner.learner(starts_after=before),
        *([planner.evaluation("evaluation-after", AFTER_FILE, after="learner")] if evaluated else []),
    )


class _Planner:
    def __init__(
        self,
        config: RunConfig,
        ports: Mapping[str, int],
        machine: Machine,
        *,
        sections: tuple[str, ...] = ("engine", "learner"),
        folder: Path | None = None,
    ) -> None:
        self._config = config
        self._machine = machine
        self._folder = folder or Path(config.run.dir)
        self._file = str(self._folder / CONFIG_FILE)
        self._servers = servers(config)
        self._engine_ports = [
            ports[_port_field(i)] if server.url is None else 0 for i, server in enumerate(self._servers)
        ]
        self._engine_urls = [
            server.url or url(config.engine.host, port)
            for server, port in zip(self._servers, self._engine_ports, strict=True)
        ]
        self._trajectory_port = ports.get("trajectory.port", 0)
        self._trajectories_url = url(config.trajectory.host, self._trajectory_port)
        self._gpus = _visible_gpus(config, machine, sections)
        self._threads = shared_threads(config, machine.num_cores)

    def trajectories(self) -> ProcessSpec:
        port, health = self._trajectory_port, f"{self._trajectories_url}/health"
        return ProcessSpec(
            name="trajectories",
            argv=self._argv("trajectories", "--port", str(port)),
            kind=Kind.SERVICE,
            log=log_path(self._folder, "trajectories"),
            env=_environment(devices=(), num_threads=1),
            ready=Ready(health, TRAJECTORIES_START_SECONDS, TrajectoryError, "see what its log ends with"),
            ports=(port,),
            ends_with="learner",
        )

    def engines(self) -> tuple[ProcessSpec, ...]:
        return tuple(self._engine(i) for i, server in enumerate(self._servers) if server.url is None)

    def _engine(self, replica: int) -> ProcessSpec:
        """The first is `engine`, the others `engine-1` and so on; with `shared` these attach to the first's weights."""
        port, timeout = self._engine_ports[replica], self._config.engine.start_timeout_seconds
        server, own_url = self._servers[replica], self._engine_urls[replica]
        devices = self._seen("engine", server.devices)
        name = _engine_name(replica)
        options = ["--attach-to", self._engine_urls[0]] if replica and self._config.bridge.name == "shared" else []
        threads = max(1, self._threads["engine"] // (server.tensor_parallel_size * num_stages(self._config)))
        return ProcessSpec(
            name=name,
            argv=self._argv(
                "serve", *self._alone(server), "--port", str(port), "--run-dir", str(self._folder), *options
            ),
            kind=Kind.SERVICE,
            log=log_path(self._folder, name),
            env=_environment(devices=devices, num_threads=threads),
            ready=Ready(f"{own_url}/health", timeout, EngineTimeout, "raise engine.start_timeout_seconds"),
            devices=devices,
            ports=(port,),
            pool=self._pool(),
        )

    def _alone(self, server: Server) -> tuple[str, ...]:
        """What an engine of a list is told of itself."""
        if not self._config.engine.servers:
            return ()
        own = (f"engine.tensor_parallel_size={server.tensor_parallel_size}", f"engine.devices={list(server.devices)}")
        return ("engine.servers=[]", "bridge.min_engines=null", *own)

    def _pool(self) -> Pool | None:
        least, names = self._config.bridge.min_engines, self._engine_names()
        if least is None or least >= len(self._servers):
            return None
        apart = len(self._servers) - len(names)
        return Pool(names, max(0, least - apart), self._config.engine.max_restarts)

    def environment(self, index: int, *, starts_after: tuple[str, ...]) -> ProcessSpec:
        environment = self._config.environments[index]
        name = f"env:{environment.name or environment.task}"
        return ProcessSpec(
            name=name,
            argv=self._argv("env", "--index", str(index), *self._urls()),
            kind=Kind.SERVICE,
            log=log_path(self._folder, name),
            env=_environment(devices=(), num_threads=1),
            starts_after=starts_after,
            ends_with="learner",
        )

    def learner(self, *, starts_after: tuple[str, ...]) -> ProcessSpec:
        """One process; with several ranks it starts them itself, and they end with it."""
        learner, devices = self._config.learner, self._seen("learner", self._config.learner.devices)
        ranks = learner.tensor_parallel_size * learner.data_parallel_size
        if devices and len(devices) != ranks:
            fault = f"{ranks} ranks on {len(devices)} GPUs, and `syncline run` starts them on this host alone"
            raise ConfigError([f"learner.data_parallel_size: {fault}; name as many devices, or use torchrun"])
        return ProcessSpec(
            name="learner",
            argv=self._argv("train", *self._urls()),
            kind=Kind.JOB,
            log=log_path(self._folder, "learner"),
            env=_environment(devices=devices, num_threads=max(1, self._threads["learner"] // ranks)),
            devices=devices,
            starts_after=starts_after,
        )

    def evaluation(self, name: str, file: str, *, after: str) -> ProcessSpec:
        """Only the one before training is skipped when done: a resumed run has trained further since the one after."""
        out = self._folder / file
        return ProcessSpec(
            name=name,
            argv=self._argv("evaluate", *self._engine_options(), "--out", str(out)),
            kind=Kind.JOB,
            log=log_path(self._folder, name),
            env=_environment(devices=(), num_threads=1),
            starts_after=(after,) if after == "learner" else self._engine_names(),
            creates=out if after == "engine" else None,
        )

    def _seen(self, section: str, devices: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self._gpus[section][index] for index in devices) if self._gpus[section] else ()

    def _argv(self, verb: str, *options: str) -> tuple[str, ...]:
        return (self._machine.python, "-m", "syncline", verb, self._file, *options)

    def _urls(self) -> tuple[str, ...]:
        return (*self._engine_options(), "--trajectories-url", self._trajectories_url)

    def _engine_options(self) -> tuple[str, ...]:
        return tuple(word for engine_url in self._engine_urls for word in ("--engine-url", engine_url))

    def _engine_names(self) -> tuple[str, ...]:
        return tuple(_engine_name(i) for i, server in enumerate(self._servers) if server.url is None)


def _engine_name(replica: int) -> str:
    return f"engine-{replica}" if replica else "engine"


def url(host: str, port: int) -> str:
    """`("::1", 8000)` → `http://[::1]:8000`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def shared_threads(config: RunConfig, num_cores: int) -> dict[str, int]:
    """CPU threads of the engine and the learner.

    On-policy the two take turns, so each gets every core; with staleness they compute at once and halve them.
    """
    halves = {"engine": num_cores - num_cores // 2, "learner": max(1, num_cores // 2)}
    shares = halves if config.run.max_staleness else {"engine": num_cores, "learner": num_cores}
    return {name: getattr(config, name).num_threads or share for name, share in shares.items()}


def _visible_gpus(config: RunConfig, machine: Machine, sections: tuple[str, ...]) -> Mapping[str, Mapping[int, str]]:
    """Of each section, indices of the configuration → the names CUDA has for them here; none on a CPU."""
    faults: list[str] = []
    visible: dict[str, dict[int, str]] = {}
    for section in sections:
        if section == "engine" and all(server.url for server in servers(config)):
            visible[section] = {}
            continue
        device = getattr(config, section).device
        wanted = all_devices(config) if section == "engine" else config.learner.devices
        on_gpu = device == "cuda" or (device == "auto" and machine.gpus)
        visible[section] = {i: machine.gpus[i] for i in wanted if on_gpu and i < len(machine.gpus)}
        if on_gpu and not machine.gpus:
            faults.append(f"{section}.device: 'cuda', but this machine shows no NVIDIA GPU; set it to cpu or auto")
        elif on_gpu and len(visible[section]) < len(set(wanted)):
            faults.append(
                f"{section}.devices: {list(wanted)} is not among this machine's {len(machine.gpus)} GPUs; "
                f"use indices below {len(machine.gpus)}"
            )
    if all(visible.get(section) for section in ("engine", "learner")):
        faults += gpus_held_twice(config)
    if faults:
        raise ConfigError(faults)
    return visible


def _environment(*, devices: tuple[str, ...], num_threads: int) -> dict[str, str]:
    """A process without devices sees none, so that it cannot take a GPU's memory by accident.

    Threads that wait for each other sleep (`PASSIVE`): engine and learner share the cores, and spinning slows both.
    """
    values = {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return values if devices else values | threads | {"OMP_WAIT_POLICY": "PASSIVE"}
