"""The plan as plain values: what starts, with which arguments, after whom, on which devices."""

from pathlib import Path
from typing import Any

import pytest

from syncline.config import RunConfig, resolve
from syncline.errors import ConfigError
from syncline.launch.plan import (
    Kind,
    Machine,
    Pool,
    ProcessSpec,
    plan,
    plan_servers,
    shared_threads,
    url,
    wanted_ports,
)

PORTS = {"engine.port": 8001, "trajectory.port": 8002}
CPU = Machine(num_cores=5, gpus=(), python="python")


def config(**sections: Any) -> RunConfig:
    run = {"dir": "runs/x", "num_steps": 4, "groups_per_step": 2} | sections.pop("run", {})
    base = {
        "run": run,
        "model": {"path": "m"},
        "sampling": {"max_tokens": 16},
        "environments": [{"task": "arithmetic"}],
    }
    return resolve(base | sections)


def planned(machine: Machine = CPU, **sections: Any) -> dict[str, ProcessSpec]:
    return {spec.name: spec for spec in plan(config(**sections), ports=PORTS, machine=machine)}


def test_order_without_evaluation() -> None:
    specs = planned(environments=[{"task": "arithmetic"}, {"task": "gsm8k", "name": "words"}])
    assert list(specs) == ["trajectories", "engine", "env:arithmetic", "env:words", "learner"]
    assert [name for name, spec in specs.items() if spec.starts_after] == [], "all start at once"
    assert [name for name, spec in specs.items() if spec.kind is Kind.JOB] == ["learner"]


def test_evaluation_surrounds_training() -> None:
    specs = planned(evaluation={"num_tasks": 8})
    assert list(specs) == [
        "trajectories", "engine", "evaluation-before", "env:arithmetic", "learner", "evaluation-after"
    ]  # fmt: skip
    assert specs["evaluation-before"].starts_after == ("engine",)
    assert specs["learner"].starts_after == ("evaluation-before",)
    assert specs["evaluation-after"].starts_after == ("learner",)
    assert specs["evaluation-before"].creates == Path("runs/x/evaluation-before.json")
    assert specs["evaluation-after"].creates is None, "a resumed run is evaluated again"
    assert specs["engine"].ends_with is None, "the evaluation after training needs it"
    assert specs["env:arithmetic"].ends_with == specs["trajectories"].ends_with == "learner"


def test_command_lines() -> None:
    specs = planned(evaluation={"num_tasks": 8})
    head = ("python", "-m", "syncline")
    urls = ("--engine-url", "http://127.0.0.1:8001", "--trajectories-url", "http://127.0.0.1:8002")
    file = "runs/x/config.yaml"
    assert specs["trajectories"].argv == (*head, "trajectories", file, "--port", "8002")
    assert specs["engine"].argv == (*head, "serve", file, "--port", "8001", "--run-dir", "runs/x")
    assert specs["env:arithmetic"].argv == (*head, "env", file, "--index", "0", *urls)
    assert specs["learner"].argv == (*head, "train", file, *urls)
    out = "runs/x/evaluation-before.json"
    assert specs["evaluation-before"].argv == (*head, "evaluate", file, *urls[:2], "--out", out)


def test_readiness_is_known_by_health_within_the_configured_time() -> None:
    ready = planned(engine={"start_timeout_seconds": 7.0})["engine"].ready
    assert ready is not None
    assert (ready.url, ready.timeout_seconds) == ("http://127.0.0.1:8001/health", 7.0)


def test_the_ranks_of_a_learner_are_one_process_that_sees_all_their_devices() -> None:
    ranks = {"devices": [0, 1], "tensor_parallel_size": 2}
    split = {"engine": ranks, "learner": ranks, "bridge": {"name": "shared"}}
    specs = planned(Machine(num_cores=8, gpus=("4", "7"), python="python"), **split)
    assert specs["learner"].argv[:4] == ("python", "-m", "syncline", "train")
    assert specs["learner"].env["CUDA_VISIBLE_DEVICES"] == specs["engine"].env["CUDA_VISIBLE_DEVICES"] == "4,7"
    on_cpu = {"device": "cpu", "tensor_parallel_size": 2}
    specs = planned(engine=on_cpu, learner=on_cpu)
    assert specs["learner"].env["OMP_NUM_THREADS"] == specs["engine"].env["OMP_NUM_THREADS"] == "2", "of 5 cores"


def test_an_engine_has_a_device_and_its_threads_for_each_rank_of_each_stage() -> None:
    machine = Machine(num_cores=16, gpus=("3", "4", "5", "6", "7"), python="python")
    stages = {"tensor_parallel_size": 2, "extra": {"pipeline_parallel_size": 2}}
    apart = {"engine": stages | {"devices": [0, 1, 2, 3]}, "learner": {"devices": [4]}, "bridge": {"name": "restart"}}
    specs = planned(machine, **apart)
    assert specs["engine"].env["CUDA_VISIBLE_DEVICES"] == "3,4,5,6"
    assert specs["learner"].env["CUDA_VISIBLE_DEVICES"] == "7"
    on_cpu = planned(machine, engine=stages | {"device": "cpu"}, learner={"device": "cpu"}, bridge={"name": "restart"})
    one = planned(machine, engine={"device": "cpu"}, learner={"device": "cpu"}, bridge={"name": "restart"})
    threads = [int(plan["engine"].env["OMP_NUM_THREADS"]) for plan in (one, on_cpu)]
    assert threads[0] // 4 == threads[1]


def test_ranks_that_split_the_data_have_their_devices_on_this_host() -> None:
    ranks = {"devices": [0, 1], "data_parallel_size": 2}
    machine = Machine(num_cores=8, gpus=("4", "7", "9"), python="python")
    specs = planned(machine, engine={"devices": [2]}, learner=ranks)
    assert specs["learner"].env["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert (
        planned(engine={"device": "cpu"}, learner={"device": "cpu", "data_parallel_size": 2})["learner"].env[
            "OMP_NUM_THREADS"
        ]
        == "2"
    ), "of 5 cores"
    several_hosts = {"devices": [0, 1], "data_parallel_size": 4}
    with pytest.raises(ConfigError, match=r"data_parallel_size: 4 ranks on 2 GPUs.*or use torchrun"):
        planned(machine, engine={"devices": [2]}, learner=several_hosts)


def test_cores_are_shared_only_when_both_compute_at_once() -> None:
    assert shared_threads(config(), 5) == {"engine": 5, "learner": 5}
    assert shared_threads(config(run={"max_staleness": 1}), 5) == {"engine": 3, "learner": 2}
    assert shared_threads(config(run={"max_staleness": 1}), 1) == {"engine": 1, "learner": 1}
    assert shared_threads(config(learner={"num_threads": 3}), 5) == {"engine": 5, "learner": 3}
    specs = planned()
    assert specs["engine"].env["OMP_NUM_THREADS"] == "5"
    assert specs["env:arithmetic"].env["OMP_NUM_THREADS"] == "1"


def test_each_process_sees_its_own_gpu() -> None:
    machine = Machine(num_cores=8, gpus=("4", "6"), python="python")
    specs = planned(machine, engine={"device": "cuda", "devices": [1]}, learner={"device": "auto", "devices": [0]})
    seen = {name: spec.env["CUDA_VISIBLE_DEVICES"] for name, spec in specs.items()}
    assert seen == {"trajectories": "", "engine": "6", "env:arithmetic": "", "learner": "4"}
    assert specs["engine"].devices == ("6",)
    assert "OMP_NUM_THREADS" not in specs["engine"].env


def test_gpus_that_are_not_there_are_all_named() -> None:
    with pytest.raises(ConfigError) as refused:
        planned(engine={"device": "cuda"}, learner={"device": "cuda"})
    assert [fault.partition(",")[0] for fault in refused.value.faults] == [
        "engine.device: 'cuda'", "learner.device: 'cuda'"
    ]  # fmt: skip
    one = Machine(num_cores=8, gpus=("0",))
    with pytest.raises(
        ConfigError, match=r"learner\.devices: \[1\] is not among this machine's 1 GPUs; use .* below 1"
    ):
        planned(one, learner={"device": "cuda", "devices": [1]})


def test_a_broadcast_within_one_gpu_is_refused_where_there_are_gpus() -> None:
    sections = {"bridge": {"name": "broadcast"}, "learner": {"device": "auto", "devices": [0]}}
    with pytest.raises(ConfigError, match=r"learner\.devices: \[0\] has GPU 0 of engine\.devices"):
        planned(Machine(num_cores=8, gpus=("0", "1")), **sections)
    planned(Machine(num_cores=8, gpus=()), **sections)
    planned(Machine(num_cores=8, gpus=("0", "1")), engine={"devices": [1]}, **sections)


def test_visible_devices_narrow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert Machine.here().gpus == ("3", "5")
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert Machine.here().gpus == ()


def test_addresses() -> None:
    assert url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert url("::1", 80) == "http://[::1]:80"
    ports = wanted_ports(config(engine={"port": 9000}))
    assert ports == {"engine.port": ("127.0.0.1", 9000), "trajectory.port": ("127.0.0.1", 0)}


def _replicated(**sections: Any) -> dict[str, ProcessSpec]:
    machine = Machine(num_cores=4, gpus=("3", "5"), python="python")
    ports = PORTS | {"engine.port + 1": 8011}
    built = config(**sections)
    assert set(wanted_ports(built)) == set(ports)
    return {spec.name: spec for spec in plan(built, ports=ports, machine=machine)}


def test_replicas_have_a_device_and_a_port_each_and_everybody_knows_all() -> None:
    specs = _replicated(engine={"num_replicas": 2, "devices": [0, 1]}, evaluation={"num_tasks": 1})
    assert (specs["engine"].devices, specs["engine-1"].devices) == (("3",), ("5",))
    assert (specs["engine"].ports, specs["engine-1"].ports) == ((8001,), (8011,))
    assert specs["engine-1"].starts_after == (), "they share nothing"
    assert specs["evaluation-before"].starts_after == ("engine", "engine-1")
    both = ("--engine-url", "http://127.0.0.1:8001", "--engine-url", "http://127.0.0.1:8011")
    for name in ("learner", "env:arithmetic", "evaluation-after"):
        assert " ".join(both) in " ".join(specs[name].argv)


def test_replicas_of_one_copy_run_on_its_device_and_attach_to_the_first() -> None:
    specs = _replicated(engine={"num_replicas": 2}, bridge={"name": "shared"})
    assert specs["engine"].devices == specs["engine-1"].devices == specs["learner"].devices == ("3",)
    assert "--attach-to" not in specs["engine"].argv
    assert specs["engine-1"].argv[-2:] == ("--attach-to", "http://127.0.0.1:8001")
    assert specs["engine-1"].starts_after == (), "they start at once, and it waits for the first by itself"


def test_replicas_share_gpus_in_turn_where_there_are_fewer() -> None:
    machine = Machine(num_cores=4, gpus=("3", "5"), python="python")
    built = config(engine={"num_replicas": 4, "devices": [0, 1]}, learner={"devices": [1]})
    ports = {field: 8001 + i for i, field in enumerate(wanted_ports(built))}
    engines = plan(built, ports=ports, machine=machine)[1:5]
    assert [(spec.name, spec.devices) for spec in engines] == [
        ("engine", ("3",)), ("engine-1", ("5",)), ("engine-2", ("3",)), ("engine-3", ("5",))
    ]  # fmt: skip
    assert all(spec.starts_after == () for spec in engines), "all start at once"


def test_replicas_take_the_ports_after_the_given_one() -> None:
    wanted = wanted_ports(config(engine={"num_replicas": 2, "devices": [0, 1], "port": 9000}))
    assert wanted["engine.port"][1] == 9000
    assert wanted["engine.port + 1"][1] == 9001


def test_each_rank_of_a_replica_has_a_device() -> None:
    machine = Machine(num_cores=4, gpus=("0", "1", "2", "3"), python="python")
    built = config(engine={"num_replicas": 2, "tensor_parallel_size": 2, "devices": [0, 1, 2, 3]})
    specs = {spec.name: spec for spec in plan(built, ports=PORTS | {"engine.port + 1": 8011}, machine=machine)}
    assert (specs["engine"].devices, specs["engine-1"].devices) == (("0", "1"), ("2", "3"))


def test_the_ranks_of_an_engine_on_a_cpu_share_its_threads() -> None:
    on_cpu = {"device": "cpu"}
    machine = Machine(num_cores=8, gpus=(), python="python")
    specs = planned(machine, engine=on_cpu | {"tensor_parallel_size": 2}, learner=on_cpu)
    assert specs["engine"].env["OMP_NUM_THREADS"] == "4"


def test_a_pool_of_engines_that_differ() -> None:
    machine = Machine(num_cores=4, gpus=tuple("01234"), python="python")
    elsewhere = "http://10.0.0.2:9000"
    listed = [{"devices": [0, 1], "tensor_parallel_size": 2}, {"url": elsewhere}, {"devices": [3]}]
    built = config(
        engine={"servers": listed, "port": 8001},
        learner={"devices": [4]},
        bridge={"name": "broadcast", "min_engines": 2},
        evaluation={"num_tasks": 1},
    )
    ports = {field: port for field, (_, port) in wanted_ports(built).items()} | {"trajectory.port": 8000}
    assert ports == {"engine.port": 8001, "engine.port + 2": 8003, "trajectory.port": 8000}
    specs = {spec.name: spec for spec in plan(built, ports=ports, machine=machine)}
    assert {name: spec.devices for name, spec in specs.items() if name.startswith("engine")} == {
        "engine": ("0", "1"), "engine-2": ("3",)
    }  # fmt: skip
    own = specs["engine"].argv[5:-4]
    assert own == (
        "engine.servers=[]", "bridge.min_engines=null", "engine.tensor_parallel_size=2", "engine.devices=[0, 1]"
    )  # fmt: skip
    urls = [specs["learner"].argv[i + 1] for i, word in enumerate(specs["learner"].argv) if word == "--engine-url"]
    assert urls == ["http://127.0.0.1:8001", elsewhere, "http://127.0.0.1:8003"]
    assert specs["evaluation-before"].starts_after == ("engine", "engine-2")
    assert specs["engine"].pool == Pool(("engine", "engine-2"), 1, 3), "the one elsewhere may be one of the two"


def test_engines_alone_need_no_gpu_of_the_learner() -> None:
    built = config(engine={"num_replicas": 2, "devices": [0, 1]}, learner={"devices": [7]})
    machine = Machine(num_cores=4, gpus=("0", "1"), python="python")
    ports = {"engine.port": 8001, "engine.port + 1": 8002}
    specs = plan_servers(built, ports=ports, machine=machine, folder=Path("runs/x-servers"))
    assert [(spec.name, spec.devices, spec.pool) for spec in specs] == [
        ("engine", ("0",), None), ("engine-1", ("1",), None)
    ]  # fmt: skip
    assert specs[0].argv[4] == "runs/x-servers/config.yaml"
