"""A model split over ranks is the model: every value and every gradient, through packing, attention and logprobs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.errors import ConfigError
from syncline.learner.attention import register_attention
from syncline.learner.model import Scorer
from syncline.learner.packing import PackedBatch, pack_samples
from syncline.learner.places import complete_gradients, local, local_gradient, place_of, shard, wholes
from syncline.learner.tensor_parallel import parallelize
from syncline.learner.vocabulary import vocabulary_rows
from syncline.types import TrainingSample, VersionSpan

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 3,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2, biases and tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3, norms of heads": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, biases after the sum": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen3, key heads shared": Qwen3Config(**SIZES | {"num_key_value_heads": 1}, head_dim=32),
    "qwen2, key heads shared": Qwen2Config(**SIZES | {"num_key_value_heads": 1}, tie_word_embeddings=True),
}


def save(config: PreTrainedConfig, folder: Path) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    model.save_pretrained(folder)
    return str(folder)


def batches() -> Sequence[PackedBatch]:
    """Uneven sequences in more than one micro-batch; tokens from both ends of the vocabulary, the padding token too."""
    samples = []
    for i, (prompt, sampled) in enumerate([(3, 9), (5, 1), (2, 14), (4, 4), (3, 4)]):
        token_ids = tuple((3 + 11 * i + 29 * j) % 70 for j in range(prompt + sampled))
        mask = (False,) * prompt + (True,) * sampled
        span = VersionSpan(0, prompt, prompt + sampled)
        samples.append(TrainingSample(token_ids, mask, (0.0,) * (prompt + sampled), (span,)))
    return pack_samples(samples, token_budget=24)


def scored(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies; parameters are left with the gradient of a loss that weighs each token differently."""
    logprobs, entropies = [], []
    for batch in batches():
        ours, entropy = Scorer(0.8, 7).score(model, batch)
        (ours * torch.linspace(-1, 2, len(ours))).sum().backward()
        logprobs.append(ours.detach())
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)


def values_and_gradients(ranks: Ranks, path: str) -> tuple[Any, Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """In float64: the softmax of attention cancels so much that float32 differs from itself by some 1e-6."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation=register_attention())
    parallelize(model, ranks)
    logprobs, entropy = scored(model)
    values = {
        name: whole.clone() for name, whole in wholes(((n, shard(p)) for n, p in model.named_parameters()), ranks)
    }
    graded = [(name, p, local_gradient(p.grad, p)) for name, p in model.named_parameters()]
    complete_gradients(((place_of(p), gradient) for _, p, gradient in graded), ranks)
    shards = [(name, shard_like(p, gradient)) for name, p, gradient in graded]
    return logprobs, entropy, values, {name: whole.clone() for name, whole in wholes(shards, ranks)}


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> Any:
    return replace(shard(parameter), tensor=tensor)


class CountedSums(TorchDispatchMode):
    """As torch's `CommDebugMode`, without its hooks on modules, which do not bear modules within autograd functions."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        self.number += func.overloadpacket.__name__ in ("all_reduce", "all_reduce_", "allreduce_")
        return func(*args, **(kwargs or {}))


def num_sums(ranks: Ranks, path: str) -> int:
    """Sums over the ranks in the forward and backward pass of one micro-batch."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=register_attention())
    parallelize(model, ranks)
    for name, parameter in model.named_parameters():
        piece = local(parameter)
        assert piece.untyped_storage().nbytes() == piece.nbytes, f"{name} keeps the whole alive"
    with CountedSums() as counted:
        Scorer(1.0, 64).score(model, batches()[0])[0].sum().backward()
    return counted.number


def of_every_family(ranks: Ranks, folder: str) -> dict[str, Any]:
    sums = num_sums(ranks, f"{folder}/{next(iter(FAMILIES))}")
    return {"num_sums": sums} | {family: values_and_gradients(ranks, f"{folder}/{family}") for family in FAMILIES}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, config in FAMILIES.items():
        save(config, folder / family)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def answers(request, models: Path) -> list[dict[str, Any]]:
    return on_ranks(of_every_family, str(models), world_size=request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_whole_models(models: Path, answers: list[dict[str, Any]], family: str) -> None:
    expected = values_and_gradients(ONE_RANK, str(models / family))
    for answer in answers:
        logprobs, entropy, values, gradients = answer[family]
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entropy, expected[1], rtol=1e-5, atol=1e-6)
        assert values.keys() == expected[2].keys()
        for name, value in values.items():
            assert torch.equal(value, expected[2][name]), name
            error = (gradients[name] - expected[3][name]).norm() / expected[3][name].norm()
            assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("size", "world_size", "expected"),
    [
        (128, 2, [(0, 64), (64, 128)]),
        (70, 2, [(0, 64), (64, 70)]),
        (70, 4, [(0, 32), (32, 64), (64, 70), (70, 70)]),
        (50257, 2, [(0, 25152), (25152, 50257)]),
    ],
)
def test_the_vocabulary_is_split_as_vllm_pads_it(size: int, world_size: int, expected: list[tuple[int, int]]) -> None:
    rows = [vocabulary_rows(size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [(r.start, r.stop) for r in rows] == expected


def refused(config: PreTrainedConfig, world_size: int) -> str:
    """Splitting is refused before anything is split, so no other rank is needed to see it."""
    model = AutoModelForCausalLM.from_config(config)
    before = list(model.state_dict())
    with pytest.raises(ConfigError) as raised:
        parallelize(model, Ranks(0, world_size, object()))  # type: ignore[arg-type]
    assert list(model.state_dict()) == before
    return str(raised.value)


def test_heads_that_do_not_go_round_are_refused_by_name() -> None:
    fault = refused(LlamaConfig(**SIZES | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}), 2)
    assert "model.layers.0.self_attn.k_proj has 3 heads" in fault
    assert "learner.tensor_parallel_size: 2" in fault
    assert "q_proj" not in fault


def test_a_number_of_ranks_that_does_not_divide_the_padded_vocabulary_is_refused() -> None:
    fault = refused(LlamaConfig(**SIZES | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}), 3)
    assert fault == "\n".join(
        f"learner.tensor_parallel_size: 3, but {name} has 128 padded rows, which that does not divide; choose another"
        for name in ("model.embed_tokens", "lm_head")
    )


def test_a_layer_the_models_plan_does_not_name_is_refused_by_name() -> None:
    config = Qwen3Config(**SIZES)
    plan = {k: v for k, v in config.base_model_tp_plan.items() if not k.endswith(("up_proj", "q_norm"))}
    config.base_model_tp_plan = plan
    fault = refused(config, 2)
    assert "model.layers.1.mlp.up_proj is in no plan" in fault
    assert "model.layers.1.self_attn.q_norm is in no plan" in fault


def test_a_model_without_a_plan_is_refused() -> None:
    config = LlamaConfig(**SIZES)
    config.base_model_tp_plan = None
    assert "'llama' has no tensor-parallel plan" in refused(config, 2)


def test_a_layer_sums_twice_in_each_direction(answers: list[dict[str, Any]]) -> None:
    """After attention and after the MLP; backward, what query, key and value send to their one input, and gate and up
    to theirs. Beside them the embedding's rows forward and the head's hidden states backward."""
    assert [answer["num_sums"] for answer in answers] == [4 * SIZES["num_hidden_layers"] + 2] * len(answers)
