"""Adapters merged exactly, targets that must exist, and scores that equal the plain forward's."""

import json
from pathlib import Path

import pytest
import torch
from model_families import save_random_model
from real_engine import make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from syncline.bridges.restart import write_weights
from syncline.config.schema import Lora, Model
from syncline.errors import ConfigError
from syncline.learner.model import (
    Scorer,
    causal_lm,
    checkpoint_parameters,
    load_model,
    saved_parameters,
    trainable_parameters,
)
from syncline.learner.packing import pack_samples
from syncline.types import Completion, FinishReason, TrainingSample, VersionSpan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def load(path: Path, **fields) -> torch.nn.Module:
    return load_model(Model(path=str(path), dtype="float32", **fields), device=CPU)


def test_checkpoint_parameters_of_a_full_model_are_its_own_and_tied_ones_come_once(model_path: Path) -> None:
    model = load(model_path)
    names = [name for name, _ in checkpoint_parameters(model)]
    assert names == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_into_fresh_tensors_and_the_base_does_not_move(model_path: Path, rslora: bool) -> None:
    model = load(model_path, lora=Lora(rank=4, alpha=8, rslora=rslora))
    for name, parameter in trainable_parameters(model):
        assert "lora_" in name
        torch.nn.init.normal_(parameter, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = dict(checkpoint_parameters(model))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert sorted(merged) == sorted(name for name, _ in load(model_path).named_parameters())

    token_ids = torch.arange(5, 25)[None]
    plain = load(model_path)
    plain.load_state_dict(merged, strict=False)
    plain.set_attn_implementation("eager")  # type: ignore[operator]
    adapted = model.merge_and_unload().eval()  # type: ignore[operator]
    adapted.set_attn_implementation("eager")
    torch.testing.assert_close(plain.eval()(token_ids).logits, adapted(token_ids).logits)


def test_targets_that_match_nothing_are_an_error_listing_what_exists(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wrong_proj'.*down_proj.*q_proj"):
        load(model_path, lora=Lora(target_modules=("wrong_proj",)))


@pytest.mark.parametrize(
    ("target", "reason"),
    [("lm_head", "the embedding's"), ("embed_tokens", "input embedding")],
    ids=["head", "embedding"],
)
def test_what_no_publish_could_say_is_not_adapted(model_path: Path, target: str, reason: str) -> None:
    """The engine has one tensor for both ends of a tied model: a head of its own would never reach it."""
    with pytest.raises(ConfigError, match=rf"target_modules: '{target}'.*{reason}.*leave it out"):
        load(model_path, lora=Lora(target_modules=("q_proj", target)))


def test_an_adapted_head_that_is_not_tied_is_published(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "untied", tied=False)
    model = load(path, lora=Lora(rank=4, target_modules=("lm_head",)))
    for _, parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    published = dict(checkpoint_parameters(model))["lm_head.weight"]
    assert not torch.equal(published, dict(checkpoint_parameters(load(path)))["lm_head.weight"])


def test_a_score_without_gradients_is_the_engines_without_dropout(model_path: Path) -> None:
    """The parity gate's: noise would be taken for another policy, and a resumed run would draw what another did not."""
    model = load(model_path, lora=Lora(rank=4, dropout=0.3))
    for _, parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    completion = Completion((20, 21, 22), (-3.0,) * 3, (VersionSpan(0, 0, 3),), FinishReason.STOP)
    [batch] = pack_samples([TrainingSample.from_completion((5, 6, 7), completion)], token_budget=64)
    scorer, drawn = Scorer(1.0, 64), torch.get_rng_state()
    scored = scorer.score_without_grad(model, batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(scorer.score(model, batch)[0], scored), "training keeps its dropout"
    torch.testing.assert_close(scorer.score(model.eval(), batch)[0], scored)


def test_a_path_without_a_model_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        load(tmp_path)


def test_scores_equal_the_plain_forward_at_the_sampling_temperature(model_path: Path) -> None:
    model = load(model_path)
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13)]
    answers = [(20, 21), (22,), (23, 24, 25)]
    samples = [
        TrainingSample.from_completion(
            p, Completion(a, (-1.0,) * len(a), (VersionSpan(0, 0, len(a)),), FinishReason.STOP)
        )
        for p, a in zip(prompts, answers, strict=True)
    ]
    [batch] = pack_samples(samples, token_budget=64)
    logprobs, entropy = Scorer(temperature=0.7, chunk_tokens=2).score(model, batch)
    lm = causal_lm(model)
    lm.set_attn_implementation("eager")
    expected = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = lm(torch.tensor([[*prompt, *answer]])).logits[0] / 0.7
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for row, token in zip(rows, answer, strict=True):
            expected[token] = (row[token], -(row.exp() * row).sum())
    for token, logprob, spread in zip(batch.labels.tolist(), logprobs, entropy, strict=True):
        torch.testing.assert_close(logprob, expected[token][0])
        torch.testing.assert_close(spread, expected[token][1])


def test_a_model_that_ships_with_dropout_is_trained_without(tmp_path: Path) -> None:
    """Phi-2 and StarCoder2 name 0.1; the engine samples without."""
    path = save_random_model("starcoder2", tmp_path)
    model = load(path)
    token_ids = torch.arange(5, 25)
    positions, borders = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    packed = {"position_ids": positions[None], "cu_seq_lens_q": borders, "max_length_q": 20, "use_cache": False}
    once, again = (model(token_ids[None], **packed).logits for _ in range(2))
    assert model.training and torch.equal(once, again)


def test_a_model_that_draws_its_experts_while_it_trains_is_trained_as_it_is_sampled(tmp_path: Path) -> None:
    """Phi-3.5-MoE adds noise to what experts see, and picks them at random, in training mode alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    experts = {"num_local_experts": 4, "router_jitter_noise": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **sizes, **experts, **heads))
    made.save_pretrained(tmp_path)
    completion = Completion(tuple(range(20, 40)), (-3.0,) * 20, (VersionSpan(0, 0, 20),), FinishReason.STOP)
    [batch] = pack_samples([TrainingSample.from_completion((5, 6, 7), completion)], token_budget=64)
    for fields in ({}, {"lora": Lora(rank=4, target_modules=("q_proj",))}):
        model, drawn = load(tmp_path, **fields), torch.get_rng_state()
        scored, _ = Scorer(1.0, 64).score(model, batch)
        assert torch.equal(torch.get_rng_state(), drawn)
        whole = made.eval()(input_ids=batch.token_ids[None]).logits[0, batch.predict_index].log_softmax(-1)
        torch.testing.assert_close(scored, whole.gather(1, batch.labels[:, None])[:, 0])
        scored.sum().backward()
        assert model.training and all(p.grad is not None for _, p in trainable_parameters(model) if p.requires_grad)


def test_experts_are_saved_as_files_name_them_and_load_again(tmp_path: Path) -> None:
    model = load(save_random_model("mixtral", tmp_path / "model"))
    for parameter in model.parameters():
        parameter.data += 0.25
    write_weights(saved_parameters(model), tmp_path / "saved", assets=tmp_path / "model")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in index["weight_map"]
    again = dict(load(tmp_path / "saved").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again[name]), name


def test_what_files_name_alike_is_saved_as_it_is(model_path: Path) -> None:
    model = load(model_path)
    assert dict(saved_parameters(model)).keys() == dict(checkpoint_parameters(model)).keys()
