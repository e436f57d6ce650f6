"""Packed pictures against each family's plain forward pass, one sequence at a time, as transformers computes it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_models import FAMILIES, WORDS, draw, expanded, save_vision_model

from syncline.config.schema import Learner, Model, Parity, Parts, Recomputation
from syncline.errors import ConfigError, ParityError, TrainingError
from syncline.learner.model import Scorer, load_model
from syncline.learner.packing import PackedBatch, pack_samples
from syncline.learner.parity import ParityGate
from syncline.learner.vision import Vision, family_of
from syncline.testing import FakeGenerate
from syncline.types import Completion, FinishReason, ImageRef, TrainingSample, VersionSpan

CPU = torch.device("cpu")
TEMPERATURE = 0.8
IMAGE = WORDS["<image>"]


def sample(prompt: tuple[int, ...], sampled: tuple[int, ...], *images: ImageRef) -> TrainingSample:
    """What the policy "sampled" is what a test says; logprobs of the sampler do not matter here."""
    start, end = len(prompt), len(prompt) + len(sampled)
    mask = (False,) * start + (True,) * len(sampled)
    return TrainingSample((*prompt, *sampled), mask, (0.0,) * end, (VersionSpan(0, start, end),), images=images)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def samples(family: str, folder: Path) -> list[TrainingSample]:
    """Two attempts that show one picture, one with two pictures of other sizes, one of text alone, and one in which the
    policy sampled an image's placeholder: to itself a word like any other."""
    wide = draw(folder / "wide.png", seed=1, size=(140, 56))
    tall = draw(folder / "tall.png", seed=2, size=(56, 112))
    one, two = expanded(family, "what?", wide), expanded(family, "and these?", tall, wide)
    text = tuple(WORDS[c] for c in "hello, you")
    return [
        sample(one, (20, 30, 40), wide),
        sample(one, (50, IMAGE, 60, 70, 8), wide),
        sample(two, (25, 35), tall, wide),
        sample(text, (11, 12, 13)),
    ]


def loaded(folder: Path, **running: Any) -> tuple[Any, Scorer]:
    everything = Model(path=str(folder), parts=Parts(aligner="trained", vision="trained"))
    model: Any = load_model(everything, device=CPU, running=Learner.model_validate(running))
    return model, Scorer(TEMPERATURE, 16, Vision.of(model.config, str(folder)))


def plain_logprobs(folder: Path, samples: list[TrainingSample]) -> tuple[Any, list[torch.Tensor]]:
    """By transformers alone: one unpacked sequence at a time. A sampled placeholder is text to its `forward` only
    where no image's is, so the embedding of one is handed in."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    vision = Vision.of(model.config, str(folder))
    assert vision is not None
    return model, [_plain(model, vision, one) for one in samples]


def _plain(model: Any, vision: Vision, one: TrainingSample) -> torch.Tensor:
    given = torch.tensor([not own for own in one.loss_mask])
    ids = torch.tensor(one.token_ids)
    own = (ids == IMAGE) & given
    told: dict[str, Any] = {}
    if one.images:
        parts = [vision._pixels(image) for image in one.images]
        told = {name: torch.cat([p[name] for p in parts], vision.family.dimension) for name in parts[0]}
        features = model.get_image_features(**told, return_dict=True)
        told = {"mm_encoder_outputs": {"image": features}}
        if vision.family.rotates:
            grids = torch.cat([p["image_grid_thw"] for p in parts])
            told["position_ids"], _ = model.model.get_rope_index(ids[None], own.int()[None], image_grid_thw=grids)
    as_text = torch.where(own | (ids != IMAGE), ids, 0)  # what looks for placeholders finds the given ones
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: (ids[None],))
    try:
        logits = model(input_ids=as_text[None], use_cache=False, **told).logits[0]
    finally:
        hook.remove()
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    where = torch.tensor(one.loss_mask).nonzero().flatten()
    return logprobs[where - 1, ids[where]]


def by_sample(samples: list[TrainingSample]) -> list[TrainingSample]:
    """As a batch has them: the longest first."""
    return sorted(samples, key=lambda one: -len(one.token_ids))


def loss(logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs * torch.linspace(-1, 2, len(logprobs))).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_values_and_gradients_are_those_of_plain_sequences(folder: Path, samples: list[TrainingSample]) -> None:
    samples = by_sample(samples)
    plain, expected = plain_logprobs(folder, samples)
    model, scorer = loaded(folder)
    [batch] = pack_samples(samples, token_budget=400)
    found, _ = scorer.score(model, batch)
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
    loss(found).backward()
    loss(torch.cat(expected)).backward()
    own, theirs = gradients(model), gradients(plain)
    assert own.keys() == theirs.keys()
    assert any(name.startswith(scorer.vision.family.tower) for name in own)  # type: ignore[union-attr]
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, atol=5e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def backward_in_pieces(folder: Path, samples: list[TrainingSample], budget: int, **running: Any) -> dict:
    model, scorer = loaded(folder, **running)
    whole = pack_samples(samples, token_budget=400)[0]
    weights = dict(zip(labels_of(whole), torch.linspace(-1, 2, whole.num_labels), strict=True))
    for batch in pack_samples(samples, token_budget=budget):
        logprobs, _ = scorer.score(model, batch)
        (logprobs * torch.stack([weights[label] for label in labels_of(batch)])).sum().backward()
    return gradients(model)


def labels_of(batch: PackedBatch) -> list[tuple[int, int]]:
    """Sampled tokens by what they are: no two of the samples share one."""
    return [(label, 0) for label in batch.labels.tolist()]


def test_the_gradient_of_many_microbatches_is_that_of_one(folder: Path, samples: list[TrainingSample]) -> None:
    whole = backward_in_pieces(folder, samples, 400)
    longest = max(len(one.token_ids) for one in samples)
    pieces = backward_in_pieces(folder, samples, longest)
    assert len(pack_samples(samples, token_budget=longest)) > 1
    recomputed = backward_in_pieces(folder, samples, longest, recomputation=Recomputation(what="full").model_dump())
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, atol=5e-5, rtol=1e-3)
        torch.testing.assert_close(recomputed[name], pieces[name], atol=1e-6, rtol=1e-5)


def test_another_picture_gives_other_logprobs(folder: Path, samples: list[TrainingSample]) -> None:
    model, scorer = loaded(folder)
    first = samples[0]
    size = (140, 56)
    other = sample(first.token_ids[:-3], first.token_ids[-3:], draw(folder / "other.png", seed=9, size=size))
    a, b = (scorer.score_without_grad(model, pack_samples([s], token_budget=400)[0]) for s in (first, other))
    assert (a - b).abs().max() > 1e-3


def test_a_picture_that_the_engine_read_otherwise_is_named(folder: Path, samples: list[TrainingSample]) -> None:
    model, scorer = loaded(folder)
    one = samples[0]
    at = one.token_ids.index(IMAGE)
    fewer = sample(one.token_ids[:at] + one.token_ids[at + 1 : -3], one.token_ids[-3:], *one.images)
    more = sample((IMAGE, IMAGE, 5, *one.token_ids[:-3]), one.token_ids[-3:], *one.images)
    for wrong in (fewer, more):
        with pytest.raises(TrainingError, match=r"wide\.png: the learner makes \d+ tokens of it, and the engine's"):
            scorer.score_without_grad(model, pack_samples([wrong], token_budget=400)[0])
    unexplained = sample((*one.token_ids[:-3], 5, IMAGE, 6), one.token_ids[-3:], *one.images)
    with pytest.raises(TrainingError, match="1 image tokens more than its 1 images explain"):
        scorer.score_without_grad(model, pack_samples([unexplained], token_budget=400)[0])


def test_a_picture_that_was_written_anew_is_refused(folder: Path) -> None:
    model, scorer = loaded(folder)
    picture = draw(folder / "changing.png", seed=3)
    draw(folder / "changing.png", seed=4)
    shown = sample((WORDS["a"], IMAGE), (9,), picture)
    with pytest.raises(ConfigError, match=r"changing\.png: has sha256"):
        scorer.score_without_grad(model, pack_samples([shown], token_budget=400)[0])


def test_the_parity_gate_looks_at_pictures(family: str, folder: Path, samples: list[TrainingSample]) -> None:
    """The engine here saw another picture of the same size: no count of tokens could tell."""
    model, scorer = loaded(folder)
    shown = samples[0]
    other = draw(folder / "gate.png", seed=5, size=(140, 56))
    [batch] = pack_samples([shown], token_budget=400)
    logprobs = tuple(scorer.score_without_grad(model, batch).tolist())
    sampled, prompt = shown.token_ids[-3:], shown.token_ids[:-3]
    said = Completion(sampled, logprobs, (VersionSpan(0, 0, 3),), FinishReason.STOP, prompt)

    def gate(image: ImageRef) -> ParityGate:
        return ParityGate(
            config=Parity(prompts=()),
            connect=lambda: nullcontext(FakeGenerate(lambda token_ids, sampling, i: said)),
            encode=lambda text: (),
            temperature=TEMPERATURE,
            scorer=scorer,
            token_budget=400,
            shown=(((IMAGE, 5), image),),
        )

    assert gate(shown.images[0]).check(model, device=CPU).max_abs_diff < 1e-4
    with pytest.raises(ParityError, match="do not hold the same policy"):
        gate(other).check(model, device=CPU)


def test_families_that_packing_would_get_wrong_are_refused_by_name() -> None:
    from transformers import AutoConfig

    for kind in ("gemma3", "paligemma"):
        with pytest.raises(ConfigError, match=f"model.path: {kind} takes images in a way"):
            family_of(AutoConfig.for_model(kind))
