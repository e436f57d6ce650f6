"""MXFP4 as the checkpoint has it: by hand, and as transformers reads it back."""

import re
from pathlib import Path

import pytest
import torch
from gpt_oss_models import recipe
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

small_model = recipe("small_model")


def test_a_block_by_hand() -> None:
    """The largest value, 10, has exponent 3: the scale is 2, and values are halved. 2.5 lies between 2 and 3, and goes
    to 2 by the even code; 3.5 to 4; 5 to 4, the even code again."""
    values = [10.0, 2.0, -1.0, 5.0, 7.0, -10.0, 1.0, 0.0]
    weight = torch.tensor([values + [0.0] * 24])
    blocks, scales = small_model.quantise(weight)
    assert scales.tolist() == [[127 + 1]]
    codes = [int(code) for byte in blocks[0, 0, :4] for code in (byte & 15, byte >> 4)]
    assert codes == [6, 2, 9, 4, 6, 14, 1, 0]


def test_transformers_reads_what_was_written() -> None:
    """Values that MXFP4 has come back as they were; the others at most a quarter of their size off."""
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 64)
    read = convert_moe_packed_tensors(*small_model.quantise(weight)).transpose(1, 2).float()
    again = convert_moe_packed_tensors(*small_model.quantise(read)).transpose(1, 2).float()
    torch.testing.assert_close(again, read, rtol=0, atol=0)
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    error = (read - weight).unflatten(-1, (-1, 32)).abs()
    assert (error <= 0.25 * largest).all()
    assert error.mean() < 0.15 * weight.abs().mean()


def test_zeros_and_the_smallest_values_have_a_scale_that_can_be_read() -> None:
    weight = torch.zeros(2, 32)
    weight[1] = 1e-38
    blocks, scales = small_model.quantise(weight)
    assert scales.tolist() == [[127], [0]]
    assert not blocks[0].any()


def test_the_folder_is_one_that_transformers_loads(tmp_path: Path) -> None:
    folder = small_model.build(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    plain = AutoModelForCausalLM.from_pretrained(small_model.build(tmp_path / "plain", quantised=False))
    assert AutoConfig.from_pretrained(folder).quantization_config["quant_method"] == "mxfp4"
    for (name, found), (other, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        if not name.endswith(("gate_up_proj", "down_proj")):
            torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0)
        else:
            assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]).float())[0, 1] > 0.98


@pytest.mark.parametrize("text", ["<|start|>assistant", "a b\n<|channel|>analysis<|message|>so [2]<|return|>"])
def test_the_tokenizer_has_a_token_for_each_of_harmonys_and_gives_texts_back(text: str) -> None:
    tokenizer = small_model.tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    special = re.findall(r"<\|\w+\|>", text)
    assert [tokenizer.decode([token]) for token in ids if token < len(small_model.SPECIAL)] == special
