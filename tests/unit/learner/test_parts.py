"""Parts of a vision-language model: what trains, what is adapted, at which rate, and that a checkpoint holds it all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vision_models import save_vision_model

from syncline.config.schema import Lora, Model, Optimizer, Parts
from syncline.errors import ConfigError
from syncline.learner.checkpoint import Checkpoints, TrainState
from syncline.learner.model import causal_lm, checkpoint_parameters, load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW
from syncline.learner.parts import family_of_model, part_of, rate_factors, trains_beside_adapter
from syncline.learner.vision import refuse_family

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model("qwen3_vl", tmp_path_factory.mktemp("qwen3"))


def loaded(path: Path, parts: Parts, lora: Lora | None = None) -> Any:
    return load_model(Model(path=str(path), parts=parts, lora=lora), device=CPU)


def trained_parts(model: Any) -> dict[str, bool]:
    """Each part with something that trains → whether that is an adapter alone."""
    family = family_of_model(causal_lm(model))
    found: dict[str, bool] = {}
    for name, _ in trainable_parameters(model):
        part = part_of(name, family)
        found[part] = found.get(part, True) and "lora_" in name
    return found


@pytest.mark.parametrize(
    ("parts", "lora", "expected"),
    [
        (Parts(), None, {"language": False}),
        (Parts(language="frozen", vision="trained"), None, {"vision": False}),
        (Parts(), Lora(rank=2), {"language": True}),
        (
            Parts(aligner="trained", vision="adapted"),
            Lora(rank=2),
            {"language": True, "aligner": False, "vision": True},
        ),
        (Parts(language="frozen", aligner="adapted"), Lora(rank=2, dora=True), {"aligner": True}),
    ],
)
def test_each_part_has_its_fate(path: Path, parts: Parts, lora: Lora | None, expected: dict[str, bool]) -> None:
    assert trained_parts(loaded(path, parts, lora)) == expected


@pytest.mark.parametrize("targets", [("q_proj", "qkv"), r".*\.(q_proj|qkv)"])
def test_targets_are_chosen_within_the_adapted_parts(path: Path, targets: Any) -> None:
    model = loaded(path, Parts(vision="adapted"), Lora(rank=2, target_modules=targets))
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "qkv"}
    with pytest.raises(ConfigError, match=r"matches no linear layer of model\.parts\.aligner"):
        loaded(path, Parts(aligner="adapted"), Lora(rank=2, target_modules=targets))


def test_a_merged_dora_is_what_the_adapted_model_computes(path: Path) -> None:
    model = loaded(path, Parts(aligner="adapted", vision="adapted"), Lora(rank=2, dora=True))
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    plain = loaded(path, Parts())
    merged = dict(checkpoint_parameters(model))
    changed = [name for name, p in plain.named_parameters() if not torch.equal(merged[name], p)]
    assert {part_of(name, family_of_model(plain)) for name in changed} == {"language", "aligner", "vision"}
    plain.load_state_dict(merged, strict=False)
    pixels = torch.randn(32, plain.config.vision_config.patch_size**2 * 6)
    grid = torch.tensor([[1, 4, 8]])
    own, other = (
        m.get_image_features(pixel_values=pixels, image_grid_thw=grid, return_dict=True).pooler_output[0]
        for m in (causal_lm(model), plain)
    )
    torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_each_part_learns_at_its_own_rate(path: Path) -> None:
    """With gradients of one, AdamW's first step is the rate."""
    model = loaded(path, Parts(aligner="trained", vision="trained"))
    config = Optimizer(learning_rate=1e-3, aligner_learning_rate=1e-4, vision_learning_rate=1e-5, max_grad_norm=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    family = family_of_model(model)
    optimizer = SplitMasterAdamW(trainable_parameters(model), config, rate_factors=rate_factors(config, family))
    for _, parameter in trainable_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.5e-3)  # half way down the schedule
    moved: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        moved.setdefault(part_of(name, family), []).append((parameter - before[name]).abs().mean().item())
    for part, rate in {"language": 0.5e-3, "aligner": 0.5e-4, "vision": 0.5e-5}.items():
        assert moved[part] == pytest.approx([rate] * len(moved[part]), rel=0.02), part


@pytest.mark.parametrize(
    ("parts", "lora"),
    [(Parts(aligner="trained", vision="trained"), None), (Parts(aligner="trained", vision="adapted"), Lora(rank=2))],
)
def test_a_checkpoint_holds_what_trains_beside_an_adapter(
    path: Path, tmp_path: Path, parts: Parts, lora: Lora | None
) -> None:
    def moved() -> tuple[Any, SplitMasterAdamW]:
        model = loaded(path, parts, lora)
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter))
        return model, SplitMasterAdamW(trainable_parameters(model), Optimizer())

    checkpoints = Checkpoints(tmp_path, 1, path)
    first, optimizer = moved()
    saved = checkpoints.save(TrainState(1, 1, 1), first, optimizer, digest="abc")
    second, optimizer = moved()
    checkpoints.load(saved, second, optimizer)
    expected = dict(first.named_parameters())
    assert all(torch.equal(expected[name], p) for name, p in second.named_parameters())


def test_an_original_cannot_be_had_by_switching_the_adapter_off_when_more_than_it_trains() -> None:
    model = Model(path="x", lora=Lora())
    assert not trains_beside_adapter(model)
    assert trains_beside_adapter(model.model_copy(update={"parts": Parts(aligner="trained")}))


def test_a_model_of_text_has_no_parts(tmp_path: Path) -> None:
    from real_engine import make_tiny_model

    with pytest.raises(ConfigError, match=r"model\.parts: is for vision-language models"):
        loaded(make_tiny_model(tmp_path), Parts(vision="trained"))


def test_a_tower_over_several_ranks_is_refused_by_name(path: Path) -> None:
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match="qwen3_vl, whose tower 2 ranks do not share"):
        refuse_family(AutoConfig.from_pretrained(path), num_ranks=2)
