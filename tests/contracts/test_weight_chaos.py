"""What can go wrong between a step and the engine, done to a real vLLM under every bridge: each fault is noticed and
named, and nothing sampled in between reaches the loss. Two engines serve all five bridges; the last tests kill them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from outcomes import Noticed
from real_engine import make_tiny_model, run_values, starting_engine, told_process, wait_until_ready
from safetensors.torch import load_file, save_file
from test_weight_bridge import ADAPTED, FAULTS, LORA, PROMPTS, TOLERANCE, Fault, Side, lora

from syncline.bridges.broadcast import BroadcastBridge
from syncline.config.schema import Bridge
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import EngineError, SyncError
from syncline.learner.versions import refuse_unproved
from syncline.types import Completion, Rollout, RolloutGroup, RolloutStatus, SamplingParams, TrainingSample

pytestmark = pytest.mark.e2e
PLAIN = ("restart", "shared", "broadcast")
GATE, UP = (f"model.layers.1.mlp.{leaf}_proj.weight" for leaf in ("gate", "up"))
ADAPTER_GATE, ADAPTER_UP = (f"base_model.model.model.layers.1.mlp.{leaf}_proj.lora_B.weight" for leaf in ("gate", "up"))
PUBLISHED = ("restart", "shared", "lora")
"""Bridges whose learner is killed in the middle of a step; `broadcast` loses its own in the middle of its sending."""


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator["Engines"]:
    with Engines(tmp_path_factory.mktemp("chaos")) as engines:
        yield engines


class Engines:
    """Both start at once: one of whole weights that others may open, and one beside which adapters lie. Each is waited
    for when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model_path = make_tiny_model(folder / "model")
        self._stack = ExitStack()
        self._starting: dict[bool, EngineController] = {}
        self._sides: dict[str, Side] = {}

    def __enter__(self) -> "Engines":
        for adapted in (False, True):
            folder = self._folder / ("adapted" if adapted else "plain")
            values = run_values(self._model_path, folder / "run", bridge={"name": "shared"})
            if adapted:
                values["model"]["lora"] = LORA
            self._starting[adapted] = self._stack.enter_context(starting_engine(values, folder))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def side(self, name: str) -> Side:
        if name == "broadcast" and torch.cuda.device_count() == 1:
            pytest.skip("NCCL broadcasts between two GPUs, and this machine has one")
        if name not in self._sides:
            engine = self._starting[name in ADAPTED]
            wait_until_ready(engine)
            self._sides[name] = Side(name, engine, self._model_path, self._folder / name)
        return self._sides[name]


@pytest.fixture(params=[*PLAIN, *ADAPTED])
def side(request: pytest.FixtureRequest, engines: Engines) -> Side:
    return engines.side(request.param)


Harm = Callable[[Any], None]
"""Given the first argument of the call that it comes before."""


class Between:
    """The engine, with somebody between it and the bridge, who does harm once, before a call."""

    def __init__(self, engine: EngineController, moment: str, harm: Harm) -> None:
        self._engine = engine
        self._moment = moment
        self._harm: Harm | None = harm
        self.name = engine.name

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self._engine, name)
        if name != self._moment or self._harm is None:
            return answer
        harm, self._harm = self._harm, None

        def harmed(*args: Any, **options: Any) -> Any:
            harm(args[0] if args else None)
            return answer(*args, **options)

        return harmed


def step(side: Side, bridge: Any, *, version: int) -> None:
    with bridge.updating(), torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, side.model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.05)
        bridge.publish(side.model, policy_version=version)


def heals(side: Side, version: int) -> None:
    """The engine is paused; whoever asks it now is answered by `version`, once that is proved, and by no other."""
    assert side.engine.health()["paused"] is True
    bridge = side.attached()

    async def asked_while_paused() -> list[Completion]:
        async with EngineClient(side.engine.url, timeout_seconds=60) as client:  # type: ignore[attr-defined]
            asking = asyncio.create_task(client.generate(PROMPTS[0], SamplingParams(8), num_completions=2))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(bridge.publish, side.model, policy_version=version)
            return await asking

    answered = asyncio.run(asked_while_paused())
    assert {span.policy_version for c in answered for span in c.versions} == {version}
    assert side.mismatch() < TOLERANCE
    bridge.close()


def harmed_bridge(side: Side, moment: str, harm: Harm, **config: Any) -> Any:
    engine, side.engine = side.engine, Between(side.engine, moment, harm)  # type: ignore[assignment]
    wanted = Bridge.model_validate({"name": side.name.removesuffix("-lora"), **config})
    bridge = lora(side, wanted) if side.name in ADAPTED else side.bridge()
    side.engine = engine
    bridge.attach(side.model)
    return bridge


def in_files(folder: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites the one file of weights in it."""
    [path] = Path(folder).glob("*model*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    index = Path(folder) / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}))


def test_a_tensor_dropped_on_the_way_is_noticed(side: Side, noticed: Noticed) -> None:
    dropped = DROPPED[side.name](side)
    message, version = r"(?s)layers\.1\.mlp\.gate_proj", side.next_version()
    with pytest.raises((SyncError, EngineError), match=message) as told:
        step(side, dropped, version=version)
    noticed("dropped on the way", side.name, by=NOTICED_BY[side.name], told=told.value)
    dropped.close()
    heals(side, version)


def _dropped_file(side: Side) -> Any:
    return harmed_bridge(side, "reload", lambda folder: in_files(folder, lambda tensors: tensors.pop(GATE)))


def _dropped_binding(side: Side) -> Any:
    """The optimizer writes a copy of its own, where the engine does not look."""
    bridge = side.attached()
    gate = side.model.model.layers[1].mlp.gate_proj.weight
    gate.data = gate.data.clone()
    return bridge


def _dropped_sending(side: Side) -> BroadcastBridge:
    """What is read of the model after the pause is what is sent."""
    paused: list[bool] = []

    def export(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return (item for item in model.named_parameters() if not (paused and item[0] == GATE))

    engine: Any = Between(side.engine, "pause", lambda _: paused.append(True))
    bridge = BroadcastBridge(
        [engine], Bridge(name="broadcast", bucket_bytes=200_000, timeout_seconds=60), export=export
    )
    bridge.attach(side.model)
    return bridge


def _dropped_from_adapter(side: Side) -> Any:
    return _tampered_adapter(side, lambda tensors: tensors.pop(ADAPTER_GATE))


def _tampered_adapter(side: Side, change: Callable[[dict[str, torch.Tensor]], Any]) -> Any:
    """Adapters go by files here, so that somebody can come between."""

    def harm(adapter: Any) -> None:
        in_files(adapter["source"]["folder"], change)

    return harmed_bridge(side, "stage", harm, adapter_transfer="files")


DROPPED: dict[str, Callable[[Side], Any]] = {
    "restart": _dropped_file,
    "shared": _dropped_binding,
    "broadcast": _dropped_sending,
    "lora": _dropped_from_adapter,
    "shared-lora": _dropped_from_adapter,
}
NOTICED_BY = dict.fromkeys(("restart", "shared"), "digests of both sides") | {
    "broadcast": "learner, as it sends",
    "lora": "engine, as it loads",
    "shared-lora": "engine, as it loads",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_spoilt_on_the_way_is_noticed(engines: Engines, fault: str, noticed: Noticed) -> None:
    side = engines.side("lora")
    before: dict[str, torch.Tensor] = {}

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        harm: Fault = FAULTS[fault]
        harm(tensors[ADAPTER_GATE], tensors[ADAPTER_UP], before["old"].to(tensors[ADAPTER_GATE]))

    bridge = _tampered_adapter(side, spoil)
    layer = dict(side.model.named_modules())[ADAPTER_GATE.removesuffix(".lora_B.weight")]
    before["old"] = layer.lora_B["default"].weight.detach().clone().cpu()  # type: ignore[union-attr]
    version = side.next_version()
    with pytest.raises((SyncError, EngineError), match=r"(?s)layers\.1\.mlp\.gate_proj\.lora_B") as told:
        step(side, bridge, version=version)
    noticed(f"{fault} on the way", "lora", by="digests of both sides", told=told.value)
    bridge.close()
    heals(side, version)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_learner_killed_in_the_middle_of_a_step_leaves_no_state_that_is_sampled_from(
    engines: Engines, name: str, noticed: Noticed
) -> None:
    side = engines.side(name)
    script = Path(__file__).parents[1] / "killed_learner.py"
    argv = [sys.executable, str(script), name, side.engine.url, str(side.model_path), str(side.folder)]  # type: ignore[attr-defined]
    path = os.pathsep.join([str(script.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with told_process(argv, "updating", environment={"PYTHONPATH": path}):
        published = side.engine.receipt()
    assert side.engine.receipt() == published
    if name == "shared":
        with pytest.raises(EngineError, match=r"answered 409.*publish a new version instead") as told:
            side.resume()
        noticed("learner killed at an update", name, by="engine, when it is to resume", told=told.value)
        heals(Side(name, side.engine, side.model_path, side.folder), published.policy_version + 1)
        return
    versions = {span.policy_version for completion in side.sample() for span in completion.versions}
    assert versions == {published.policy_version}
    noticed(
        "learner killed at an update", name, by="nobody needs to", told="the engine samples on: it has its own copy"
    )
    step(side, side.attached(), version=side.next_version())
    assert side.mismatch() < TOLERANCE


def test_another_adapter_under_the_policys_name_is_trained_on_by_nobody(
    engines: Engines, tmp_path: Path, noticed: Noticed
) -> None:
    side = engines.side("lora")
    step(side, side.attached(), version=side.next_version())
    url = side.engine.url  # type: ignore[attr-defined]
    name = httpx.get(f"{url}/lora/status", timeout=30).json()["active_adapter_name"]
    other = side.load(side.model_path)
    other.save_pretrained(tmp_path)
    body = {"adapter_path": str(tmp_path), "adapter_name": name}
    assert httpx.post(f"{url}/lora/load", json=body, timeout=60).is_success
    [completion, *_] = side.sample()
    with pytest.raises(ValueError, match=r"sampled tokens from \d+ on have no version span") as told:
        TrainingSample.from_completion(PROMPTS[0], completion)
    noticed("same name, another adapter", "lora", by="engine gives no version, so no sample is made", told=told.value)
    assert httpx.post(f"{url}/lora/unload", json={}, timeout=60).is_success
    assert side.mismatch() < TOLERANCE, "the policy's own adapter is sampled from again"


def test_tokens_of_a_version_that_this_learner_never_published_do_not_reach_the_loss(
    side: Side, noticed: Noticed
) -> None:
    """Another learner has the engine; this one is behind."""
    proved = side.engine.receipt().policy_version
    step(side, side.attached(), version=proved + 1)
    rollouts = tuple(
        Rollout((TrainingSample.from_completion(PROMPTS[0], completion),), 1.0, RolloutStatus.COMPLETED)
        for completion in side.sample(prompts=PROMPTS[:1])
    )
    group = RolloutGroup("g", "arithmetic", 0, rollouts)
    refuse_unproved([group], proved=proved + 1)
    with pytest.raises(SyncError, match=f"tokens of policy version {proved + 1}, and the last .* is {proved};") as told:
        refuse_unproved([group], proved=proved)
    noticed("tokens of an unknown version", side.name, by="learner, before the loss", told=told.value)


@pytest.mark.parametrize(("name", "moment"), [("restart", "reload"), ("lora", "stage")])
def test_an_engine_killed_in_the_middle_of_an_update_is_named(
    engines: Engines, name: str, moment: str, noticed: Noticed
) -> None:
    """The last of each engine."""
    side = engines.side(name)
    process = side.engine.process  # type: ignore[attr-defined]

    def kill(_: Any) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    bridge = harmed_bridge(side, moment, kill)
    with pytest.raises(EngineError, match=side.engine.name) as told:
        step(side, bridge, version=side.next_version())
    noticed("engine killed at an update", name, by="learner", told=told.value)
    bridge.close()
