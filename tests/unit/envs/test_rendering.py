"""`ChatPolicy` over real tokenizer files, with and without a chat template."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from syncline.envs.rendering import ChatPolicy, load_tokenizer
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate
from syncline.types import Message, SamplingParams

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
CHARACTERS = "0123456789+=[]>user "


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    vocabulary = {token: i for i, token in enumerate(("<eos>", "<unk>", *dict.fromkeys(CHARACTERS)))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens([AddedToken("<eos>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", unk_token="<unk>").save_pretrained(tmp_path)
    return tmp_path


def policy(tokenizer: Any, *, max_tokens: int = 8, max_length: int = 64) -> ChatPolicy:
    generate = FakeGenerate(lambda prompt, sampling, i: completion("7"))
    return ChatPolicy(tokenizer, generate, SamplingParams(max_tokens=max_tokens), max_length=max_length)


def test_without_chat_template_contents_are_read_one_after_the_other(tokenizer_dir: Path):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    ids = policy(tokenizer).encode([Message("system", "12"), Message("user", "+7=")])
    assert tokenizer.convert_ids_to_tokens(list(ids)) == list("12+7=")


def test_chat_template_is_applied_with_the_generation_prompt(tokenizer_dir: Path):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.chat_template = TEMPLATE
    ids = policy(tokenizer).encode([Message("user", "1+2=")])
    assert tokenizer.convert_ids_to_tokens(list(ids)) == list("[user]1+2=>")


def test_decode_leaves_special_tokens_out(tokenizer_dir: Path):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert policy(tokenizer).decode([*tokenizer.convert_tokens_to_ids(["1", "9"]), tokenizer.eos_token_id]) == "19"


def test_folder_without_tokenizer_is_a_config_error_with_remedy(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.tokenizer.*hub name"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_completion_is_bounded_by_what_max_length_leaves():
    generate = FakeGenerate(lambda prompt, sampling, i: completion("7"))
    chat = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=8, temperature=0.5), max_length=10)
    asyncio.run(chat.sample((1, 2, 3, 4), num_completions=2))
    asyncio.run(chat.sample((1,), num_completions=1))
    assert [sampling.max_tokens for _, sampling, _ in generate.calls] == [6, 8]
    assert {sampling.temperature for _, sampling, _ in generate.calls} == {0.5}


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        policy(CharacterTokenizer()).encode([Message("user", "")])
