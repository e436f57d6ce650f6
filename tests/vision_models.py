"""Random vision-language models of a few hundred thousand parameters, and pictures for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engine import vllm_has

from syncline.observe.images import image_ref
from syncline.types import ImageRef

needs_whole_pictures = pytest.mark.skipif(
    not vllm_has("max(num_patches, 1)", "model_executor/models/idefics3.py"),
    reason="this vLLM counts no patch in a picture that Idefics3 does not split, and cannot start: use a newer one",
)
IDEFICS_WORDS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
SPECIAL = ("<image>", "<vision_start>", "<vision_end>", "<video>", *IDEFICS_WORDS)
NAMED = {"<image>": "image_token", "<video>": "video_token"}
VISION_WORDS = ("<pad>", "<eos>", "<unk>", *SPECIAL, "\n")
WORDS = {word: i for i, word in enumerate((*VISION_WORDS, *map(chr, range(32, 127))))}
TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
QWEN_TOKENS = {
    "image_token_id": WORDS["<image>"],
    "video_token_id": WORDS["<video>"],
    "vision_start_token_id": WORDS["<vision_start>"],
    "vision_end_token_id": WORDS["<vision_end>"],
    "tie_word_embeddings": True,
}
QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **QWEN_TOKENS,
        "text_config": TEXT | MROPE,
        "vision_config": QWEN_TOWER | {"embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2, "spatial_merge_size": 2},
    },
    "qwen2_5_vl": {
        **QWEN_TOKENS,
        "text_config": TEXT | MROPE,
        "vision_config": QWEN_TOWER
        | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "window_size": 56}
        | {"spatial_merge_size": 2, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        **QWEN_TOKENS,
        "text_config": TEXT | {"head_dim": 32} | MROPE,
        "vision_config": QWEN_TOWER
        | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 128, "spatial_merge_size": 2}
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    },
    "idefics3": {
        "image_token_id": WORDS["<image>"],
        "scale_factor": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "text_config": TEXT | {"model_type": "llama", "tie_word_embeddings": False},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 56, "patch_size": 14},
    },
}
SHOWN = {"idefics3": "<image>"}
"""What stands for an image in a prompt; of the other families `<vision_start><image><vision_end>`."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}SHOWN{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_vision_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A random model with its tokenizer, chat template and image processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer = _tokenizer(family)
    if family == "idefics3":
        _save_idefics_processor(folder, tokenizer)
    else:
        _save_qwen_processor(family, folder, tokenizer)
    return folder


def draw(path: Path, *, seed: int, size: tuple[int, int] = (56, 56)) -> ImageRef:
    """A picture of random noise, no two seeds alike."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return image_ref(path)


def _tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={NAMED.get(word, f"special_{i}"): word for i, word in enumerate(SPECIAL)},
    )
    fast.chat_template = TEMPLATE.replace("SHOWN", SHOWN.get(family, "<vision_start><image><vision_end>"))
    return fast


def _save_idefics_processor(folder: Path, tokenizer: Any) -> None:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    Idefics3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_len=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_qwen_processor(family: str, folder: Path, tokenizer: Any) -> None:
    """Written by hand: without torchvision, which its video processor wants, the class cannot be made."""
    tokenizer.save_pretrained(folder)
    names = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    sizes = {"size": {"shortest_edge": 784, "longest_edge": 50176}, "patch_size": 14, "temporal_patch_size": 2}
    shared = {"processor_class": names[family], "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", **sizes, **shared}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))


def expanded(family: str, text: str, *images: ImageRef) -> tuple[int, ...]:
    """Images and text as an engine would read them: by hand, from the pictures' sizes."""
    from PIL import Image

    words: list[str] = []
    for image in images:
        width, height = Image.open(image.path).size
        if family == "idefics3":
            words += ["<fake_token_around_image>", "<global-img>", *["<image>"] * 4, "<fake_token_around_image>"]
        else:
            words += ["<vision_start>", *["<image>"] * (width // 28 * (height // 28)), "<vision_end>"]
    return tuple(WORDS[word] for word in (*words, *text))
