"""The demo's base model: the loss by hand, the tokenizer as others load it, and the cache."""

import dataclasses
import importlib.util
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from syncline.envs.tasks.arithmetic import split_of

PATH = Path(__file__).parents[3] / "recipes" / "demo" / "base_model.py"
_spec = importlib.util.spec_from_file_location("demo_base_model", PATH)
assert _spec and _spec.loader
base_model = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = base_model
_spec.loader.exec_module(base_model)

TINY = dataclasses.replace(
    base_model.Recipe(),
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    batch_size=4,
    num_steps=2,
    num_noisy_steps=1,
    num_threads=1,
)


def test_expected_loss_is_the_mean_over_misprints():
    digits, eos = [base_model.VOCABULARY[d] for d in base_model.DIGITS], base_model.VOCABULARY["<eos>"]
    logits = torch.zeros(2, len(base_model.VOCABULARY))
    logits[0, digits[3]] = 2.0
    targets = torch.tensor([digits[3], eos])
    losses = -logits.log_softmax(-1)
    printed_right = losses[0, digits[3]]
    misprinted = losses[0, digits].mean()
    expected = (0.7 * printed_right + 0.3 * misprinted + losses[1, eos]) / 2
    assert base_model.expected_loss(logits, targets, misprints=0.3) == pytest.approx(expected.item())
    assert base_model.expected_loss(logits, targets, misprints=0.0) == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item()
    )


def test_loss_is_over_answer_and_end_only():
    (task,) = islice(base_model.tasks_of(TINY, split="train"), 1)
    ids, labels = base_model._tensors([task])
    text = f"{task.expression}={task.answer}"
    assert ids[0].tolist() == [base_model.VOCABULARY[c] for c in text] + [base_model.VOCABULARY["<eos>"]]
    answer_length = len(str(task.answer)) + 1
    assert (labels[0] != base_model.IGNORED).tolist() == [False] * (len(text) + 1 - answer_length) + [
        True
    ] * answer_length


def test_steps_are_the_sums_from_the_left_and_all_of_them_are_learnt():
    task = base_model.ArithmeticTask((12, 7, 5), ("+", "+"), "")
    assert base_model.steps(task) == ["12+7=19", "19+5=24"]
    ids, labels = base_model._tensors([task], shows_steps=True)
    words = {number: token for token, number in base_model.VOCABULARY.items()}
    assert "".join(words[i] for i in ids[0].tolist()) == "12+7+5=12+7=19Ġ19+5=24<eos>"
    assert (labels[0] != base_model.IGNORED).tolist() == [False] * 7 + [True] * 16


def test_built_model_and_tokenizer_load_as_anybody_would(tmp_path: Path):
    path = base_model.build_base_model(tmp_path, TINY)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.encode("12 + 7*3-4=")
    assert tokenizer.convert_ids_to_tokens(ids) == list("12Ġ+Ġ7*3-4=")
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "12 + 7*3-4="
    model = Qwen2ForCausalLM.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_second_build_is_the_first_and_another_recipe_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = base_model.build_base_model(tmp_path, TINY)
    other = base_model.build_base_model(tmp_path, dataclasses.replace(TINY, seed=1))
    monkeypatch.setattr(base_model, "train", None)
    assert base_model.build_base_model(tmp_path, TINY) == path
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(recipe: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_model.build_base_model(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_held_out_sums_are_not_trained_on():
    tasks = list(islice(base_model.tasks_of(TINY, split="train"), 500))
    assert {split_of(task.operands) for task in tasks} == {"train"}
