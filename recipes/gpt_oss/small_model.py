"""Builds a GPT-OSS of a few hundred thousand random parameters with MXFP4 experts, in the layout of the published ones.

The architecture is GPT-OSS's: attention with learned sinks and a window in every other layer, a router with a bias, and
experts whose gate and up rows take turns. The experts are quantised here, as the OCP's Microscaling Formats
(version 1.0, section 6.3) have it; the tokenizer knows the Harmony format's tokens, and one token a character beside
them.

    python recipes/gpt_oss/small_model.py --out DIR [--seed N]
"""

import argparse
import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of a 4-bit float without its sign, the fourth bit."""
LARGEST_EXPONENT, BIAS = 2, 127
NOT_QUANTISED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
SPECIAL = (
    "<|pad|>",
    "<|return|>",
    "<|unk|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|call|>",
    "<|constrain|>",
)
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace))) + " "
TEMPLATE = (
    "{{ '<|start|>system<|message|>You are ChatGPT.\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final."
    " Channel must be included for every message.<|end|>' }}"
    "{% for message in messages %}"
    "{% set role = 'developer' if message.role == 'system' else message.role %}"
    "{% set channel = '<|channel|>final' if role == 'assistant' else '' %}"
    "{{ '<|start|>' + role + channel + '<|message|>' + message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""The Harmony format, as short as it goes; a published model brings its own."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., out, in]` to blocks `[..., out, in / 32, 16]` and scales `[..., out, in / 32]`, both uint8.

    A block's scale is 2 to the power of its largest value's exponent less 2, the largest of an E2M1; what then lies
    above 6 is 6. Of two neighbours the first is in the low half of its byte.
    """
    groups = weight.float().unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(-1)
    exponent = torch.where(largest > 0, largest.log2().floor() - LARGEST_EXPONENT, torch.zeros_like(largest))
    exponent = exponent.clamp(-BIAS, BIAS)
    values = torch.tensor(E2M1, device=weight.device)
    distance = (groups.abs() * torch.exp2(-exponent)[..., None]).unsqueeze(-1) - values
    nearest = _even_of_the_nearest(distance.abs())
    codes = (nearest + 8 * (groups < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + BIAS).to(torch.uint8)


def _even_of_the_nearest(distance: Tensor) -> Tensor:
    """The index of the smallest along the last dimension; of two that are equal, the even one."""
    first = distance.argmin(-1)
    second = (first + 1).clamp(max=len(E2M1) - 1)
    tie = distance.gather(-1, second[..., None])[..., 0] == distance.gather(-1, first[..., None])[..., 0]
    return torch.where(tie & (first % 2 == 1), second, first)


def build(folder: Path, *, seed: int = 0, quantised: bool = True, **sizes: Any) -> Path:
    """A folder with weights, configuration and tokenizer; `sizes` replace those of `configuration`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configuration(**sizes)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, sinks in model.named_parameters():
            if name.endswith("sinks"):
                sinks.normal_()
    model.save_pretrained(folder)
    if quantised:
        _quantise_folder(folder)
    tokenizer().save_pretrained(folder)
    return folder


def configuration(**sizes: Any) -> Any:
    from transformers import GptOssConfig

    values: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 256,
        },
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return GptOssConfig(**values | sizes)


def tokenizer() -> Any:
    """One token a character, and Harmony's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate((*SPECIAL, *CHARACTERS))}
    plain = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    plain.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<|pad|>", eos_token="<|return|>", unk_token="<|unk|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def _quantise_folder(folder: Path) -> None:
    """Experts `[E, in, out]` to blocks and scales of `[E, out, in]`."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantise(tensors.pop(name).transpose(1, 2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_QUANTISED}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a small random GPT-OSS with MXFP4 experts.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(build(args.out, seed=args.seed))


if __name__ == "__main__":
    main()
