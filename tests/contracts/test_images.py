"""Pictures, both sides: learner and a real vLLM read and score them alike, version after version, through every bridge
that carries whole weights. What a vision tower made of a picture is kept by vLLM; no later version may be served it."""

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engine import run_values, running_engine
from vision_models import WORDS, draw, expanded, needs_whole_pictures, save_vision_model

from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.restart import RestartBridge
from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge, Lora, Model, Parts
from syncline.engines.client import EngineClient, EngineController
from syncline.envs.conversation import Conversation
from syncline.envs.rendering import ChatPolicy, load_tokenizer
from syncline.errors import SyncError
from syncline.learner.model import (
    Scorer,
    causal_lm,
    checkpoint_parameters,
    checkpoint_shards,
    load_model,
    saved_parameters,
)
from syncline.learner.packing import pack_samples
from syncline.learner.vision import Vision
from syncline.protocols import WeightBridge
from syncline.types import ImageRef, Message, SamplingParams, TrainingSample

pytestmark = pytest.mark.e2e
DEVICE, TOLERANCE = ("cuda", 0.15) if torch.cuda.is_available() else ("cpu", 1e-4)
TEMPERATURE = 0.8
NEEDS_TORCHVISION = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's Qwen-VL wants torchvision; install it"),
]
FAMILIES = [
    pytest.param("idefics3", marks=needs_whole_pictures),
    *(pytest.param(name, marks=NEEDS_TORCHVISION) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
]
"""On a CPU vLLM runs the first without torchvision."""
PARTS = Parts(aligner="trained", vision="trained")


class Side:
    def __init__(self, family: str, engine: EngineController, model_path: Path, folder: Path) -> None:
        self.family, self.engine, self.model_path, self.folder = family, engine, model_path, folder
        self.wide = draw(folder / "wide.png", seed=1, size=(112, 56))
        self.tall = draw(folder / "tall.png", seed=2, size=(56, 84))
        self.tokenizer = load_tokenizer(str(model_path))

    def load(self, lora: Lora | None = None, parts: Parts = PARTS, *, bridge: str = "") -> Any:
        """The learner's model; of NCCL's `broadcast` on a GPU that is not the engine's."""
        apart = bridge == "broadcast" and DEVICE == "cuda"
        if apart and torch.cuda.device_count() == 1:
            pytest.skip("NCCL broadcasts between two GPUs, and this machine has one")
        config = Model(path=str(self.model_path), lora=lora, parts=parts)
        return load_model(config, device=torch.device("cuda:1" if apart else DEVICE))

    def bridge(self, name: str) -> WeightBridge:
        config = Bridge.model_validate({"name": name})
        if name == "shared":
            return SharedBridge([self.engine], config, shards=checkpoint_shards)
        if name == "broadcast":
            return BroadcastBridge([self.engine], config, export=checkpoint_parameters)
        folder, assets = self.folder / "versions", self.model_path
        named: dict[str, Any] = {"export": checkpoint_parameters, "saved": saved_parameters}
        return RestartBridge([self.engine], config, folder=folder, assets=assets, **named)

    def publish(self, bridge: WeightBridge, model: Any) -> None:
        bridge.publish(model, policy_version=self.engine.receipt().policy_version + 1)

    def sampled(self) -> list[TrainingSample]:
        """One picture, asked for twice at once; two pictures; two turns, with a picture in each; and text alone."""
        return asyncio.run(self._sampled())

    async def _sampled(self) -> list[TrainingSample]:
        async with EngineClient(self.engine.url, timeout_seconds=60) as client:  # type: ignore[attr-defined]
            policy = ChatPolicy(self.tokenizer, client, SamplingParams(8, temperature=TEMPERATURE), max_length=300)
            asked = [(self.wide,), (self.wide,), (self.tall, self.wide), ()]
            first = [Conversation(policy, (Message("user", "what?", images),)) for images in asked]
            await asyncio.gather(*(conversation.ask() for conversation in first))
            again = first[0]
            again.messages = (*again.messages, Message("user", "and this?", (self.tall,)))
            await again.ask()
            return [sample for conversation in first for sample in conversation.samples]

    def mismatch(self, model: Any, samples: list[TrainingSample]) -> float:
        """The largest mean |Δlogprob| of a sample."""
        vision = Vision.of(causal_lm(model).config, str(self.model_path))
        scorer, differences = Scorer(TEMPERATURE, 64, vision), []
        for batch in pack_samples(samples, token_budget=300):
            scored = scorer.score_without_grad(model, batch.to(model.device)).cpu()
            difference = (scored - batch.sampler_logprobs).abs()
            differences += [difference[batch.sample_index == i].mean().item() for i in batch.sample_index.unique()]
        return max(differences)


@pytest.fixture(scope="module", params=FAMILIES)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp(request.param)
    model_path = save_vision_model(request.param, folder / "model")
    values = run_values(model_path, folder / "run", bridge={"name": "shared"})
    limits = {"image": 2} if request.param == "idefics3" else {"image": 2, "video": 0}
    values["model"]["max_length"] = 300
    values["engine"].setdefault("extra", {})["limit_mm_per_prompt"] = limits
    with running_engine(values, folder) as engine:
        yield Side(request.param, engine, model_path, folder)


def move(model: Any, *, where: str) -> None:
    """A large step of the parameters whose names begin so."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.removeprefix("base_model.model.").startswith(where):
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("name", ["restart", "broadcast", "shared"])
def test_both_sides_score_pictures_alike_after_every_step(side: Side, name: str) -> None:
    model = side.load(bridge=name)
    bridge = side.bridge(name)
    bridge.attach(model)
    side.publish(bridge, model)
    before = side.sampled()
    assert side.mismatch(model, before) < TOLERANCE
    vision = Vision.of(model.config, str(side.model_path))
    assert vision is not None
    for where in (vision.family.tower, "model"):
        with bridge.updating():
            move(model, where=where)
            side.publish(bridge, model)
        after = side.sampled()
        assert side.mismatch(model, after) < TOLERANCE, "served what an older tower made of a picture"
        assert side.mismatch(model, before) > 2 * TOLERANCE, "nothing is shown: the step changed too little"
        before = after
    bridge.close()


def test_the_prompt_is_as_the_engine_read_it(side: Side) -> None:
    bridge, model = side.bridge("restart"), side.load()
    bridge.attach(model)
    side.publish(bridge, model)
    *turns, _, two, text = side.sampled()  # one sample of both turns, or two where a special token was sampled
    turn = expanded(side.family, "what?", side.wide)
    assert turn == turns[0].token_ids[len("user:") :][: len(turn)]
    assert two.images == (side.tall, side.wide)
    assert not text.images
    assert WORDS["<image>"] not in text.token_ids[: len("user:what?")]
    assert turns[-1].images == (side.wide, side.tall), "the second turn has the first one's picture too"


@pytest.mark.parametrize("name", ["restart", "broadcast"])
def test_dora_on_language_and_tower_reaches_the_engine_merged(side: Side, name: str) -> None:
    parts = Parts(aligner="trained", vision="adapted")
    model = side.load(Lora(rank=4, alpha=16, dora=True), parts, bridge=name)
    bridge = side.bridge(name)
    bridge.attach(model)
    side.publish(bridge, model)
    before = side.sampled()
    with bridge.updating():
        move(model, where="")
        side.publish(bridge, model)
    assert side.mismatch(model, side.sampled()) < TOLERANCE
    assert side.mismatch(model, before) > 2 * TOLERANCE
    bridge.close()


def test_pictures_that_are_none_are_refused_by_name(side: Side) -> None:
    path = side.folder / "words.png"
    path.write_text("no picture")
    from syncline.observe.images import image_ref

    async def ask(image: ImageRef) -> None:
        async with EngineClient(side.engine.url, timeout_seconds=60) as client:  # type: ignore[attr-defined]
            await client.generate((WORDS["<image>"], 5), SamplingParams(1), images=[image])

    with pytest.raises(Exception, match=r"images\.0: is no image file"):
        asyncio.run(ask(image_ref(path)))


def test_an_adapter_of_a_tower_is_no_adapter_that_an_engine_serves(side: Side) -> None:
    from syncline.learner.adapter import AdapterLayers

    model = side.load(Lora(rank=4), Parts(aligner="trained"))
    with pytest.raises(SyncError, match=r"set bridge\.name to restart"):
        list(AdapterLayers()(model))
