"""Pictures in packed sequences: which tokens stand for an image, what the vision tower makes of it, where it is.

A sample's tokens are the prompt as the engine read it, a placeholder for each of an image's features. The learner makes
its own features of the same file and puts them where the engine put its own; another number of them is an error naming
the image. What a policy sampled is text whatever its number, so a sampled placeholder stands for no image. Each picture
of a micro-batch is seen once, however many attempts show it, and autograd adds up what they say of it.

Families differ in little, which `FAMILIES` tells. One that is not there is refused: image tokens that see each other
both ways, or features that depend on a neighbour's, would be silently wrong in a packed sequence.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncline.errors import ConfigError, TrainingError
from syncline.learner.packing import PackedBatch
from syncline.observe.images import read_image
from syncline.types import ImageRef


@dataclass(frozen=True, slots=True)
class Family:
    tower: str
    """Name of the module that sees pictures, in the model."""
    aligner: tuple[str, ...]
    """Names of what maps its features to the language model's."""
    dimension: int
    """Along which a processor's tensors lay one picture behind the other."""
    rotates: bool
    """Positions are (time, row, column): M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
    stacks: bool = False
    """Some of the tower's features are added to layers of the language model (DeepStack, arXiv 2406.04334)."""


_QWEN = Family("model.visual", ("model.visual.merger",), dimension=0, rotates=True)
FAMILIES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": Family(
        "model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"), 0, rotates=True, stacks=True
    ),
    "idefics3": Family("model.vision_model", ("model.connector",), dimension=1, rotates=False),
}
"""By transformers' `model_type`; each is proved against the family's plain forward pass, values and gradients."""


def sees(config: Any) -> bool:
    """Whether a transformers configuration is of a model with a vision tower."""
    return getattr(config, "vision_config", None) is not None


def family_of(config: Any) -> Family:
    """Raises `ConfigError` for a family whose images are not known to be exact in packed sequences."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            [
                f"model.path: {config.model_type} takes images in a way that was not shown to be exact in packed "
                f"sequences (Gemma 3 and PaliGemma let image tokens see each other both ways); use one of "
                f"{', '.join(FAMILIES)}"
            ]
        )
    return FAMILIES[config.model_type]


def refuse_family(config: Any, *, num_ranks: int) -> None:
    """Raises `ConfigError` for what is not trained here: an unknown family, or a tower over several ranks."""
    family_of(config)
    if num_ranks > 1:
        fault = f"model.path is of {config.model_type}, whose tower {num_ranks} ranks do not share; set both to 1"
        raise ConfigError([f"learner.tensor_parallel_size, learner.data_parallel_size: {fault}"])


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the tower made of one picture."""

    features: Tensor
    """`[tokens, hidden]`."""
    stacked: tuple[Tensor, ...]
    """As many `[tokens, hidden]` as layers of the language model get some."""
    grid: Tensor | None
    """`[1, 3]`: patches in time, rows and columns."""


@dataclass(frozen=True, slots=True)
class Vision:
    """`processor` is the family's image processor, `image_token_id` the placeholder."""

    family: Family
    processor: Any
    image_token_id: int

    @classmethod
    def of(cls, config: Any, path: str) -> "Vision | None":
        """For the model at `path` with this configuration; `None` for one that sees nothing. Raises `ConfigError`."""
        from transformers import AutoImageProcessor

        if not sees(config):
            return None
        family = family_of(config)
        try:
            return cls(family, AutoImageProcessor.from_pretrained(path), config.image_token_id)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError([f"model.path: {path!r} has no image processor that loads here: {error}"]) from error

    def inputs(self, lm: Any, batch: PackedBatch) -> dict[str, Any]:
        """Keywords of the language model's decoder: embeddings `[1, T, hidden]` with the images' features in them,
        position ids `[1, T]` or `[3, 1, T]`."""
        embeddings = lm.get_input_embeddings()(batch.token_ids)
        placeholders = self._placeholders(batch)
        seen = self._seen(lm, batch)
        shown = [self._placed(images, own, seen) for images, own in zip(batch.images, placeholders, strict=True)]
        told: dict[str, Any] = {"position_ids": self._positions(lm, batch, placeholders, shown)}
        everything = [one for images in shown for one in images]
        if everything:
            mask = torch.cat(placeholders).to(embeddings.device)
            features = torch.cat([one.features for one in everything]).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(mask[:, None], features)
            if self.family.stacks:
                told["visual_pos_masks"] = mask[None]
                layers = zip(*(one.stacked for one in everything), strict=True)
                told["deepstack_visual_embeds"] = [torch.cat(layer) for layer in layers]
        return told | {"inputs_embeds": embeddings[None]}

    def _placeholders(self, batch: PackedBatch) -> list[Tensor]:
        """Of each sequence `[length]` bool, on the CPU: where an image's token is that nobody sampled."""
        borders = batch.cu_seqlens.tolist()
        sampled = torch.zeros(batch.num_tokens + 1, dtype=torch.bool)
        sampled[batch.predict_index.cpu() + 1] = True
        sampled[borders] = False  # a sequence's last label is beyond its end; its first token is given
        mask = (batch.token_ids.cpu() == self.image_token_id) & ~sampled[:-1]
        return list(mask.split([end - start for start, end in itertools.pairwise(borders)]))

    def _seen(self, lm: Any, batch: PackedBatch) -> Mapping[str, _Seen]:
        """By content. Nothing runs for a micro-batch without pictures."""
        pictures = {image.sha256: image for images in batch.images for image in images}
        if not pictures:
            return {}
        parts = [self._pixels(image) for image in pictures.values()]
        along = self.family.dimension
        pixels = {name: torch.cat([p[name] for p in parts], along).to(batch.token_ids.device) for name in parts[0]}
        answer = lm.get_image_features(**pixels, return_dict=True)
        features, stacked = list(answer.pooler_output), list(getattr(answer, "deepstack_features", None) or ())
        if not self.family.rotates:  # a row of features a tile, and of a picture as many as it was cut into
            counts = [part["pixel_values"].shape[along] for part in parts]
            features = [rows.flatten(0, 1) for rows in answer.pooler_output.split(counts)]
        return {
            name: _Seen(own, tuple(layer[i] for layer in stacked), parts[i].get("image_grid_thw"))
            for i, (name, own) in enumerate(zip(pictures, features, strict=True))
        }

    def _pixels(self, image: ImageRef) -> dict[str, Tensor]:
        from PIL import Image

        content = io.BytesIO(read_image(image))
        try:
            picture = Image.open(content).convert("RGB")
        except OSError as error:
            raise ConfigError([f"image {image.path}: is no picture ({error})"]) from error
        made = self.processor(images=[picture], return_tensors="pt")
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _placed(self, images: Sequence[ImageRef], placeholders: Tensor, seen: Mapping[str, _Seen]) -> list[_Seen]:
        """The pictures of one sequence in order. Raises `TrainingError` naming one that has not as many placeholders
        as features."""
        runs = [len(list(run)) for placed, run in itertools.groupby(placeholders.tolist()) if placed]
        for image in images:
            wanted, found = len(seen[image.sha256].features), 0
            while runs and found < wanted:
                found += runs.pop(0)
            if found != wanted:
                raise TrainingError(
                    f"image {image.path}: the learner makes {wanted} tokens of it, and the engine's prompt has {found} "
                    "there; give both the same preprocessor_config.json and engine.extra.mm_processor_kwargs none"
                )
        if runs:
            raise TrainingError(f"a prompt has {sum(runs)} image tokens more than its {len(images)} images explain")
        return [seen[image.sha256] for image in images]

    def _positions(
        self, lm: Any, batch: PackedBatch, placeholders: Sequence[Tensor], shown: Sequence[Sequence[_Seen]]
    ) -> Tensor:
        """From 0 in every sequence, as transformers counts them for the sequence alone."""
        if not self.family.rotates:
            return batch.position_ids[None]
        ids = batch.token_ids.cpu().split([len(own) for own in placeholders])
        positions = []
        for tokens, own, images in zip(ids, placeholders, shown, strict=True):
            grids = torch.cat([image.grid for image in images if image.grid is not None]).cpu() if images else None
            found, _ = lm.model.get_rope_index(tokens[None], own.int()[None], image_grid_thw=grids)
            positions.append(found)
        return torch.cat(positions, dim=2).to(batch.token_ids.device)
