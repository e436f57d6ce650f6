"""The parts of a vision-language model: which of them train, which get an adapter, and how fast each learns.

A model of text is all language. The names of the other parts are the family's (`vision.FAMILIES`).
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from syncline.config.schema import Lora, Model, Optimizer
from syncline.errors import ConfigError
from syncline.learner.vision import Family, family_of, sees

LANGUAGE, ALIGNER, VISION = "language", "aligner", "vision"


def part_of(name: str, family: Family | None) -> str:
    """Whose parameter or module has this name, with or without PEFT's prefix."""
    name = name.removeprefix("base_model.model.")
    if family is None:
        return LANGUAGE
    if any(_within(name, module) for module in family.aligner):
        return ALIGNER
    return VISION if _within(name, family.tower) else LANGUAGE


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def family_of_model(model: Any) -> Family | None:
    """`None`: of text alone."""
    return family_of(model.config) if sees(model.config) else None


def fates(config: Model) -> dict[str, str]:
    """What becomes of each part: `trained`, `adapted` or `frozen`."""
    parts = config.parts
    language = ("adapted" if config.lora else "trained") if parts.language == "auto" else parts.language
    return {LANGUAGE: language, ALIGNER: parts.aligner, VISION: parts.vision}


def trains_beside_adapter(config: Model) -> bool:
    """Whether switching the adapter off would not bring the original back."""
    return config.lora is not None and "trained" in fates(config).values()


def adapter_targets(model: Any, config: Model, lora: Lora) -> list[str] | None:
    """The layers of the adapted parts, by name; `None` for a model of text, which has no parts to choose from.

    Raises `ConfigError` naming a part in which nothing is to be adapted.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    family = family_of_model(model)
    if family is None:
        return None
    adapted = [part for part, fate in fates(config).items() if fate == "adapted"]
    matching = {part: list(_matching(model, targets, part, family)) for part in adapted}
    for part, names in matching.items():
        if not names:
            raise ConfigError([f"model.lora.target_modules: {targets!r} matches no linear layer of model.parts.{part}"])
    return [name for names in matching.values() for name in names]


def _matching(model: Any, targets: str | list[str], part: str, family: Family) -> Iterator[str]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) and module is not head
        if linear and part_of(name, family) == part and _is_meant(name, targets):
            yield name


def _is_meant(name: str, targets: str | list[str]) -> bool:
    """By PEFT's rules: a text is a pattern of the whole name, a list has names or their ends."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def freeze_parts(model: nn.Module, config: Model, family: Family | None) -> None:
    """Leaves `requires_grad` on what trains. Raises `ConfigError` for parts that a model of text has not."""
    if family is None:
        if config.parts != type(config.parts)():
            raise ConfigError(["model.parts: is for vision-language models, and model.path is of text; leave it out"])
        return
    fate = fates(config)
    for name, parameter in model.named_parameters():
        own = fate[part_of(name, family)]
        parameter.requires_grad_(own == "adapted" if "lora_" in name else own == "trained")


def rate_factors(config: Optimizer, family: Family | None) -> Callable[[str], float]:
    """A parameter's name → its learning rate as a share of `learning_rate`, whose schedule all parts follow."""
    rates = {LANGUAGE: None, ALIGNER: config.aligner_learning_rate, VISION: config.vision_learning_rate}
    shares = {part: 1.0 if rate is None else rate / config.learning_rate for part, rate in rates.items()}
    return lambda name: shares[part_of(name, family)]
