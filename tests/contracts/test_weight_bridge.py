"""The contract every weight bridge passes, against a real vLLM (its CPU build on a machine without a GPU)."""

import asyncio
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from outcomes import Noticed
from real_engine import make_tiny_model, run_values, running_engine
from transformers import AutoModelForCausalLM

from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.digest import tensor_digest
from syncline.bridges.lora import LoraBridge
from syncline.bridges.receipt import kind_of, model_digest, parameter_digests
from syncline.bridges.restart import RestartBridge
from syncline.bridges.shared import SharedBridge
from syncline.cli import main
from syncline.config.schema import Bridge, Lora
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import EngineError, SyncError
from syncline.learner.adapter import AdapterLayers, base_parameters
from syncline.learner.model import add_lora, checkpoint_parameters, checkpoint_shards
from syncline.protocols import Receipt, SyncReport, WeightBridge
from syncline.types import Completion, SamplingParams

pytestmark = pytest.mark.e2e
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 0.15) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-4)
"""Of a completion's mean |Δlogprob|. A stale tensor moves it by 0.5 and more; bf16 kernels that round differently by
a few hundredths, and now and then by far more where the random weights grow: adapters' steps are of 0.05."""
PROMPTS = tuple(tuple(range(5 + i, 12 + i)) for i in range(6))
MOST_STEPS = 20


def restart(side: "Side", config: Bridge) -> WeightBridge:
    return RestartBridge(
        [side.engine], config, export=checkpoint_parameters, folder=side.folder, assets=side.model_path
    )


def shared(side: "Side", config: Bridge) -> WeightBridge:
    return SharedBridge([side.engine], config, shards=checkpoint_shards)


def broadcast(side: "Side", config: Bridge) -> WeightBridge:
    few_buckets = {"bucket_bytes": 200_000, "timeout_seconds": 60.0, "sparse": side.name == "broadcast-sparse"}

    def export(model: Any) -> Any:
        side.before_export()
        return checkpoint_parameters(model)

    return BroadcastBridge([side.engine], config.model_copy(update=few_buckets), export=export)


def lora(side: "Side", config: Bridge) -> WeightBridge:
    return LoraBridge(
        [side.engine],
        config,
        base=base_parameters,
        layers=AdapterLayers(),
        folder=side.folder,
        shares_base=config.name == "shared",
    )


MakeBridge = Callable[["Side", Bridge], WeightBridge]
BRIDGES: dict[str, MakeBridge] = {
    "restart": restart,
    "shared": shared,
    "broadcast": broadcast,
    "broadcast-sparse": broadcast,
    "lora": lora,
    "shared-lora": lora,
}
TENSOR_PARALLEL = {"restart": (1, 2, 4), "broadcast": (1, 2, 4), "broadcast-sparse": (2,), "lora": (1, 2, 4)}
"""Ranks of the engine, if not one; `shared` on two needs as many learner ranks: `test_shared_ranks`."""
ASKED_FOR = (("broadcast", 2), ("restart", 2), ("lora", 2))
"""Left to `make slow`: every run has two ranks in `broadcast-sparse`, `test_shared_ranks` and `test_lora_ranks`."""
IN_TWO_STAGES = (("restart", 1), ("broadcast", 1), ("lora", 1))
"""Bridges to engines of vLLM's pipeline parallelism, and the ranks of each stage."""
ADAPTED = ("lora", "shared-lora")
LORA = {"rank": 4, "alpha": 22.0}
"""A rank below vLLM's smallest slot, and a scaling of 5.5, which rounds and makes a stale adapter show."""


def learner_device(name: str, *, ranks: int = 1) -> str:
    """NCCL has no two ranks on one GPU, and the engine's are on the first."""
    return f"cuda:{ranks}" if DEVICE == "cuda" and name.startswith("broadcast") else DEVICE


class Side:
    """Both sides of a bridge: a learner's model and the engine that should follow it."""

    def __init__(self, name: str, engine: EngineController, model_path: Path, folder: Path, *, ranks: int = 1) -> None:
        self.engine = engine
        self.model_path = model_path
        self.device = learner_device(name, ranks=ranks)
        self.name = name
        self.model = self.load(model_path)
        self.folder = folder
        self.before_export: Callable[[], None] = lambda: None
        """Called when `broadcast` asks for what it sends; weights that stay are digested without asking again."""
        self._initial = [parameter.detach().clone() for parameter in self.model.parameters()]

    def load(self, path: Path) -> Any:
        """The learner's model: whole, or with an adapter where the bridge moves one."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE).to(self.device)
        return add_lora(model, Lora.model_validate(LORA)) if self.name in ADAPTED else model

    def digests(self) -> dict[str, str]:
        """What the engine must hold, computed the plain way: an adapter's words are eight bytes, whatever its shape."""
        if self.name not in ADAPTED:
            return parameter_digests(self.model.named_parameters())
        digests = parameter_digests(base_parameters(self.model))
        for name, layer in AdapterLayers()(self.model):
            for end, tensor in (("A", layer.a), ("B", layer.b.float() * layer.scaling)):
                held = tensor.detach().to(DTYPE)
                digests[f"{name}.lora_{end}.weight"] = (
                    f"{kind_of(held)}:{tensor_digest(held.view(-1).view(torch.int64)):016x}"
                )
        return digests

    def reset(self) -> None:
        """The first weights again: random steps add up, and with them what half precision rounds away."""
        with torch.no_grad():
            for parameter, initial in zip(self.model.parameters(), self._initial, strict=True):
                parameter.copy_(initial)

    def bridge(self, *, in_flight: str = "drain", config: Bridge | None = None) -> WeightBridge:
        name = self.name.partition("-")[0]
        return BRIDGES[self.name](self, config or Bridge.model_validate({"name": name, "in_flight": in_flight}))

    def attached(self, *, in_flight: str = "drain") -> WeightBridge:
        bridge = self.bridge(in_flight=in_flight)
        bridge.attach(self.model)
        return bridge

    def next_version(self) -> int:
        return self.engine.receipt().policy_version + 1

    def resume(self) -> None:
        """By hand: it holds what it says."""
        self.engine.resume(self.engine.receipt())

    def step(self, bridge: WeightBridge, *, scale: float = 0.05) -> SyncReport:
        """What a training step does to the weights, as the loop does it."""
        few = self.name == "broadcast-sparse"  # a tenth of the values, as much further
        with bridge.updating():
            with torch.no_grad():
                for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
                    noise = torch.randn_like(parameter) * scale
                    parameter.add_(3 * noise * (torch.rand_like(parameter) < 0.1) if few else noise)
            return bridge.publish(self.model, policy_version=self.next_version())

    def sample(self, *, max_tokens: int = 12, prompts=PROMPTS) -> list[Completion]:
        async def sample() -> list[list[Completion]]:
            async with EngineClient(self.engine.url, timeout_seconds=60) as client:
                params = SamplingParams(max_tokens, temperature=0.8, seed=3)
                return await asyncio.gather(*(client.generate(p, params, num_completions=2) for p in prompts))

        return [completion for group in asyncio.run(sample()) for completion in group]

    def mismatch(self, prompts=PROMPTS) -> float:
        """The largest mean |Δlogprob| of a completion: what the engine says it sampled against the learner's model."""
        completions = self.sample(prompts=prompts)
        return max(self.difference(prompts[i // 2], c, self.model) for i, c in enumerate(completions))

    @staticmethod
    def difference(prompt: tuple[int, ...], completion: Completion, model: Any) -> float:
        """Mean |Δlogprob| over the completion, of one version."""
        return Side.span_difference(prompt, completion, model, (0, len(completion.token_ids)))

    @staticmethod
    @torch.no_grad()
    def span_difference(prompt: tuple[int, ...], completion: Completion, model: Any, span: tuple[int, int]) -> float:
        token_ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
        logits = model(token_ids).logits[0].float().cpu() / 0.8
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        learner = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        return (learner - torch.tensor(completion.logprobs))[slice(*span)].abs().mean().item()


def _copy(model: Any) -> Any:
    """The model as it is now, in memory of its own."""
    return copy.deepcopy(model)


def _engines() -> list[Any]:
    """Every bridge with every number of ranks, and of stages; several ranks need as many GPUs, where there are GPUs."""
    flat = [(name, ranks, 1) for name in sorted(BRIDGES) for ranks in TENSOR_PARALLEL.get(name, (1,))]
    return [
        pytest.param(
            (name, ranks, stages),
            id=f"{row}-tp{ranks}",
            marks=[
                pytest.mark.contract(row, ranks),
                pytest.mark.skipif(0 < torch.cuda.device_count() < gpus, reason=f"needs {gpus} GPUs"),
                *([pytest.mark.slow] if ranks > 2 or stages > 1 or (name, ranks) in ASKED_FOR else []),
            ],
        )
        for name, ranks, stages in [*flat, *((name, ranks, 2) for name, ranks in IN_TWO_STAGES)]
        for gpus in [ranks * stages + name.startswith("broadcast")]
        for row in [f"{name}-pp{stages}" if stages > 1 else name]
    ]


@pytest.fixture(scope="module", params=_engines())
def side(request, tmp_path_factory) -> Iterator[Side]:
    name, ranks, stages = request.param
    folder, size = tmp_path_factory.mktemp(f"{name}-tp{ranks}"), ranks * stages
    model_path = make_tiny_model(folder / "model")
    values = run_values(model_path, folder / "run", bridge={"name": name.partition("-")[0]})
    extra = values["engine"].get("extra", {}) | ({"pipeline_parallel_size": stages} if stages > 1 else {})
    on = {"device": DEVICE, "devices": list(range(size)), "tensor_parallel_size": ranks, "extra": extra}
    values["engine"] |= on
    values["learner"] = {"device": DEVICE, "devices": [size if name.startswith("broadcast") else 0]}
    if name in ADAPTED:
        values["model"]["lora"] = LORA
    with running_engine(values, folder) as engine:
        yield Side(name, engine, model_path, folder / "weights", ranks=size)


def test_before_the_first_publish_no_version_is_claimed(side: Side) -> None:
    if side.engine.receipt().policy_version >= 0:
        pytest.fail("this test runs first: a fresh engine must answer with version -1")
    assert all(completion.versions == () for completion in side.sample(max_tokens=3))


def test_publish_proves_the_digest_and_the_engine_samples_from_the_learners_weights(side: Side) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    assert side.mismatch() < TOLERANCE
    version = side.next_version()
    report = side.step(bridge)
    expected = model_digest(side.digests())
    assert report.receipt == side.engine.receipt()
    assert report.receipt.policy_version == version
    assert report.receipt.digest == expected
    assert side.mismatch() < TOLERANCE, "the tied lm_head, the fused layers or the prefix cache kept old weights"
    assert {span.policy_version for c in side.sample() for span in c.versions} == {version}


def test_publishing_unchanged_weights_moves_no_bytes(side: Side) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    version = side.next_version()
    report = bridge.publish(side.model, policy_version=version)
    assert report.num_bytes == 0
    assert side.engine.receipt().policy_version == version


def test_versions_only_grow(side: Side) -> None:
    bridge = side.attached()
    version = side.next_version()
    bridge.publish(side.model, policy_version=version)
    with pytest.raises(SyncError, match=f"older than {version}"):
        bridge.publish(side.model, policy_version=version - 1)
    _assert_paused_then_resume(side)


def test_a_model_the_engine_does_not_serve_is_refused_by_parameter_name(
    side: Side, tmp_path: Path, noticed: Noticed
) -> None:
    other = side.load(make_tiny_model(tmp_path / "other", hidden_size=64, tied=False))
    with pytest.raises(SyncError, match=r"lm_head\.weight: missing in the engine") as told:
        side.bridge().attach(other)
    noticed("wrong model", side.name, by="learner, at attach", told=told.value)


def test_weights_that_are_not_finite_are_not_published(side: Side, noticed: Noticed) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    version = side.engine.receipt().policy_version
    trained = [(name, p) for name, p in side.model.named_parameters() if p.requires_grad]
    weight = next(parameter for name, parameter in trained if "layers.1.mlp.down_proj" in name)
    good = weight.detach().clone()
    message = r"layers\.1\.mlp\.down_proj\.(lora_A\.)?weight is not finite"
    with pytest.raises(SyncError, match=message) as told, bridge.updating():
        with torch.no_grad():
            weight[0, 0] = float("nan")
        bridge.publish(side.model, policy_version=version + 1)
    noticed("NaN after a step", side.name, by="learner, before it publishes", told=told.value)
    assert side.engine.receipt().policy_version == version
    with torch.no_grad():
        weight.copy_(good)
    bridge.publish(side.model, policy_version=version + 1)
    assert side.mismatch() < TOLERANCE


class Saboteur:
    """An engine's control that, once, spoils the learner's weights between their digest and their way to the engine."""

    def __init__(self, engine: EngineController, moment: str) -> None:
        self._engine = engine
        self._moment = moment
        self.spoil: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == self._moment and self.spoil is not None:
            spoil, self.spoil = self.spoil, None
            spoil()
        return getattr(self._engine, name)


def _truncate(gate: torch.Tensor, up: torch.Tensor, old: torch.Tensor) -> None:
    gate[len(gate) // 2 :] = 0


def _swap(gate: torch.Tensor, up: torch.Tensor, old: torch.Tensor) -> None:
    kept = gate.clone()
    gate.copy_(up)
    up.copy_(kept)


def _stale(gate: torch.Tensor, up: torch.Tensor, old: torch.Tensor) -> None:
    gate.copy_(old)


def _half(gate: torch.Tensor, up: torch.Tensor, old: torch.Tensor) -> None:
    gate[len(gate) // 2 :] = old[len(gate) // 2 :]


def _poison(gate: torch.Tensor, up: torch.Tensor, old: torch.Tensor) -> None:
    gate[0, 0] = float("nan")


Fault = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
FAULTS: dict[str, Fault] = {
    "truncated": _truncate,
    "swapped": _swap,
    "stale": _stale,
    "half updated": _half,
    "poisoned": _poison,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_spoilt_on_the_way_are_caught_and_named(side: Side, fault: str, noticed: Noticed) -> None:
    if side.name in ADAPTED:
        pytest.skip("an adapter's way is spoilt in test_weight_chaos")
    engine = side.engine
    saboteur = Saboteur(engine, {"shared": "adopt", "restart": "receipt"}.get(side.name, "nothing"))
    side.engine = saboteur  # type: ignore[assignment]
    bridge = side.attached()
    side.engine = engine
    bridge.publish(side.model, policy_version=side.next_version())
    version, mlp = side.next_version(), side.model.model.layers[1].mlp
    gate, up, old = mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.gate_proj.weight.detach().clone()
    named = r"layers\.1\.mlp\.gate_proj\.weight: the learner"
    with pytest.raises(SyncError, match=named) as told, bridge.updating(), torch.no_grad():
        for parameter in side.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        good = gate.clone(), up.clone()
        saboteur.spoil = side.before_export = lambda: FAULTS[fault](gate, up, old)
        bridge.publish(side.model, policy_version=version)
    side.before_export = lambda: None
    assert engine.health()["paused"] is True
    with pytest.raises(EngineError, match=r"answered 409.*publish one instead of resuming"):
        side.resume()
    with torch.no_grad():
        gate.copy_(good[0])
        up.copy_(good[1])
    bridge.publish(side.model, policy_version=version)
    assert side.mismatch() < TOLERANCE
    noticed(f"{fault} on the way", side.name, by="digests of both sides", told=told.value)


def test_a_failure_while_the_weights_move_leaves_the_engine_paused(side: Side) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    with pytest.raises(RuntimeError, match="half-way"), bridge.updating():
        raise RuntimeError("half-way")
    _assert_paused_then_resume(side)


def test_the_engine_samples_while_the_learner_steps_unless_it_reads_what_the_step_writes(side: Side) -> None:
    """What asynchronous mode rests on; the forward and backward passes are outside of `updating` altogether."""
    bridge = side.attached()
    version = side.next_version()
    bridge.publish(side.model, policy_version=version)
    with bridge.updating():
        assert side.engine.health()["paused"] is (side.name == "shared")
        if side.name != "shared":
            assert {span.policy_version for c in side.sample() for span in c.versions} == {version}
        bridge.publish(side.model, policy_version=version + 1)
    assert {span.policy_version for c in side.sample() for span in c.versions} == {version + 1}


def test_requests_in_flight_end_under_one_version_and_are_never_torn(side: Side) -> None:
    """Steps move every weight while requests run: each completion must be of one version, and of its weights alone."""
    completions, weights = _sample_over_steps(side, side.attached(), max_tokens=40)
    assert all(len(completion.versions) == 1 for _, completion in completions)
    assert _worst_span(side, completions, weights) < TOLERANCE
    seen = {span.policy_version for _, completion in completions for span in completion.versions}
    assert len(seen) >= 2, "no request was in flight while the weights moved"


def test_requests_kept_in_flight_have_each_token_under_the_version_that_sampled_it(side: Side) -> None:
    """They freeze and go on: every span must be of its own version's weights, the tokens before it their context."""
    if side.name in ADAPTED:
        return  # requests end, unpaused, under the adapter they began with: the test above
    bridge = side.attached(in_flight="keep")
    completions, weights = _sample_over_steps(side, bridge, max_tokens=80, until=_one_was_kept)
    assert _one_was_kept(completions), "no request was kept over a step"
    assert all(len(completion.token_ids) == completion.versions[-1].end for _, completion in completions)
    assert _worst_span(side, completions, weights) < TOLERANCE


def test_what_tells_torn_requests_tells_them(side: Side) -> None:
    """The control of the two tests above: half of the weights of one version under the name of another; and with
    `shared`, where the learner can write what the engine reads, a gate that is left open while requests run."""
    side.reset()
    bridge = side.attached()
    version = side.next_version()
    bridge.publish(side.model, policy_version=version)
    whole, torn = _copy(side.model), _copy(side.model)
    _move_half(torn)
    asked = [(prompt, completion) for prompt in PROMPTS for completion in side.sample(max_tokens=40, prompts=[prompt])]
    assert _worst_span(side, asked, {version: whole}) < TOLERANCE < _worst_span(side, asked, {version: torn})
    if side.name != "shared":
        return  # nobody but the engine itself can write its weights
    open_gate = _sample_while_written(side)
    assert {span.policy_version for _, completion in open_gate for span in completion.versions} == {version}
    assert _worst_span(side, open_gate, {version: whole}) > TOLERANCE
    side.reset()
    bridge.publish(side.model, policy_version=version + 1)
    assert side.mismatch() < TOLERANCE


def _move_half(model: Any) -> None:
    with torch.no_grad():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained[1::2]:  # B of adapters: A alone does nothing while B is 0
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _sample_while_written(side: Side) -> "Sampled":
    """One request a prompt; weights are moved, by nobody's leave, until all have ended."""

    async def ask() -> Sampled:
        async with EngineClient(side.engine.url, timeout_seconds=120) as client:
            params = SamplingParams(80, temperature=0.8)
            asking = asyncio.gather(*(client.generate(prompt, params, num_completions=2) for prompt in PROMPTS))
            while not asking.done():
                await asyncio.sleep(0.05)
                await asyncio.to_thread(_move_half, side.model)
            return [(prompt, c) for prompt, group in zip(PROMPTS, await asking, strict=True) for c in group]

    return asyncio.run(ask())


def test_verify_tells_whether_the_engine_holds_a_checkpoint(side: Side, tmp_path: Path, capsys) -> None:
    bridge = side.attached()
    side.step(bridge)
    side.model.save_pretrained(tmp_path / "same")
    argv = ["verify", str(tmp_path / "same"), "--engine-url", side.engine.url]
    assert main(argv) == 0
    assert side.engine.receipt().digest in capsys.readouterr().out
    side.step(bridge)
    assert main(argv) == SyncError.exit_code
    changed = "layers.0.mlp.down_proj.lora_A" if side.name in ADAPTED else "embed_tokens"
    kind = "[4, 256]" if side.name in ADAPTED else "[70, 128]"
    dtype = str(DTYPE).removeprefix("torch.")
    assert f"model.{changed}.weight: the checkpoint {dtype}{kind}" in capsys.readouterr().err


def test_an_adapter_with_magnitudes_reaches_the_engine_merged(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA, which vLLM does not serve as an adapter: what is sampled from is what PEFT computes unmerged."""
    if side.name not in ("restart", "broadcast"):
        pytest.skip("refused by a rule of the configuration")
    dora = add_lora(side.load(side.model_path), Lora.model_validate(LORA | {"dora": True}))
    monkeypatch.setattr(side, "model", dora)
    bridge = side.attached()
    base = {name: parameter.clone() for name, parameter in base_parameters(dora)}
    for _ in range(2):
        side.step(bridge)
        assert side.mismatch() < TOLERANCE
    assert all(torch.equal(base[name], parameter) for name, parameter in base_parameters(dora)), "the base moved"


Sampled = list[tuple[tuple[int, ...], Completion]]


def _one_was_kept(sampled: Sampled) -> bool:
    return any(len(completion.versions) > 1 for _, completion in sampled)


def _sample_over_steps(
    side: Side, bridge: WeightBridge, *, max_tokens: int, until: Callable[[Sampled], bool] = bool
) -> tuple[Sampled, dict[int, Any]]:
    """Requests that never cease over three steps, and more until `until`: on busy cores the next ones may be asked for
    too late to be in flight at a step. Prompt and completion of each, and the weights by version."""
    side.reset()
    bridge.publish(side.model, policy_version=side.next_version())
    weights = {side.next_version() - 1: _copy(side.model)}
    sampled: Sampled = []
    short = SamplingParams(max_tokens // 8, temperature=0.8, seed=1)
    long = SamplingParams(max_tokens, temperature=0.8)
    scale = 0.05 if side.name in ADAPTED else 0.1

    async def ask(client: EngineClient, prompt: tuple[int, ...], params: SamplingParams, done: asyncio.Event) -> None:
        last = False
        while not last:
            last = done.is_set()
            sampled.extend((prompt, c) for c in await client.generate(prompt, params, num_completions=2))

    async def steps() -> None:
        done = asyncio.Event()
        async with EngineClient(side.engine.url, timeout_seconds=120) as client:
            pairs = [(prompt, params) for prompt in PROMPTS for params in (short, long)]
            asking = [asyncio.create_task(ask(client, *pair, done)) for pair in pairs]
            while len(weights) <= 3 or (len(weights) <= MOST_STEPS and not until(sampled)):
                await asyncio.sleep(0.1)
                await asyncio.to_thread(side.step, bridge, scale=scale)
                weights[side.next_version() - 1] = _copy(side.model)
            done.set()
            await asyncio.gather(*asking)

    asyncio.run(steps())
    return sampled, weights


def _worst_span(side: Side, completions: Sampled, weights: dict[int, Any]) -> float:
    """The largest mean |Δlogprob| of a span under its own version; a few tokens' mean is given more room."""
    return max(
        side.span_difference(prompt, completion, weights[span.policy_version], (span.start, span.end))
        * min(1.0, math.sqrt((span.end - span.start) / 12))
        for prompt, completion in completions
        for span in completion.versions
    )


def test_weights_changed_behind_the_bridges_back_are_not_sampled_from(side: Side) -> None:
    """An engine paused, written to by somebody and resumed without a publish refuses to go on."""
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    side.engine.pause(mode="abort", timeout_seconds=30)
    side.resume()
    if not side.name.startswith("shared"):
        return  # nobody but the engine itself can write its weights
    side.engine.pause(mode="abort", timeout_seconds=30)
    written = next(side.model.parameters())
    before = written.detach().clone()
    with torch.no_grad():
        written.add_(1)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"answered 409.*publish a new version instead"):
            side.resume()
    if side.name in ADAPTED:
        with torch.no_grad():
            written.copy_(before)  # the base is not published, so no publish can make this good
    bridge.publish(side.model, policy_version=side.next_version())
    assert side.mismatch() < TOLERANCE


def test_reload_of_a_running_engine_is_refused(side: Side) -> None:
    with pytest.raises(EngineError, match=r"answered 409.*pause it first"):
        side.engine.adopt(Receipt(side.next_version(), side.engine.receipt().digest))


@pytest.mark.parametrize("other", ["version", "digest"])
def test_an_engine_that_holds_something_else_is_not_resumed(side: Side, other: str) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    side.engine.pause(mode="abort", timeout_seconds=30)
    held = side.engine.receipt()
    later, unknown = replace(held, policy_version=held.policy_version + 1), replace(held, digest="0" * 64)
    with pytest.raises(EngineError, match=r"answered 409.*asked to resume .*publish instead"):
        side.engine.resume(later if other == "version" else unknown)
    _assert_paused_then_resume(side)


def _assert_paused_then_resume(side: Side) -> None:
    assert httpx.get(f"{side.engine.url}/health", timeout=10).json()["paused"] is True
    side.resume()
    assert side.sample()
