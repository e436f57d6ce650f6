"""Recomputed and compiled layers give what plain ones give, and no micro-batch's size compiles them again."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import library, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Qwen2Config

from syncline.config.schema import Recomputation
from syncline.errors import ConfigError
from syncline.learner.attention import register_attention
from syncline.learner.layers import compile_layers, decoder_layers, recompute_layers

CONFIG = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BATCHES = ([7, 5, 5], [9, 4, 3, 2], [11, 3], [8, 8, 8, 1], [6])


@pytest.fixture(autouse=True)
def forget_compilations() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def model(attention: str | None = None) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, attn_implementation=attention or register_attention()).train()


def run(packed: Any, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the mean of their squares."""
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed.zero_grad()
    logits = packed(
        input_ids=torch.randint(64, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        use_cache=False,
    ).logits
    logits.square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in packed.parameters()])


class Kept:
    """Bytes autograd keeps from the forward pass for the backward one, beside the weights."""

    def __init__(self, packed: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in packed.parameters()}
        self.tensors: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @classmethod
    def by(cls, packed: Any) -> int:
        kept = cls(packed)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            run(packed, [40, 24])
        return sum(kept.tensors.values())


COMPILED = (
    *((what, False) for what in ("none", "selective", "full")),
    ("full", True),
    *(pytest.param(what, True, marks=pytest.mark.slow) for what in ("none", "selective")),
)


@pytest.mark.parametrize(("what", "compiled"), COMPILED)
def test_values_and_gradients_are_those_of_plain_layers(what: str, compiled: bool) -> None:
    plain, ours = model(), model()
    recompute_layers(ours, Recomputation.model_validate({"what": what}))
    if compiled:
        compile_layers(ours, backend="aot_eager")
    for result, expected in zip(run(ours, BATCHES[0]), run(plain, BATCHES[0]), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)


def test_recomputing_keeps_less_the_more_layers_do_it() -> None:
    kept = []
    for every in (None, 3, 1):
        packed = model()
        if every:
            recompute_layers(packed, Recomputation(what="full", every=every))
        kept.append(Kept.by(packed))
    none, third, full = kept
    assert full < 0.3 * none
    assert full < third < none


@library.custom_op("test::attend", mutates_args=())
def attend(query: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
    return query.clone()


@attend.register_fake
def _(query: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.empty_like(query)


attend.register_autograd(lambda ctx, gradient: (gradient, None, None), setup_context=lambda **_: None)


def opaque_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """As a GPU's kernels look to the compiler: one operator that is told the borders and the longest length."""
    out = attend(query[0].transpose(0, 1), kwargs["cu_seq_lens_q"], kwargs["max_length_q"])
    return (out + 0 * (key.sum() + value.sum())).unsqueeze(0), None


@pytest.mark.parametrize("what", ["none", "full"])
def test_ten_layers_and_five_sizes_are_compiled_as_often_as_one_layer_and_one_size(what: str) -> None:
    AttentionInterface.register("opaque", opaque_attention)
    AttentionMaskInterface.register("opaque", lambda *args, **kwargs: None)
    counter = CompileCounterWithBackend("aot_eager")
    packed = model("opaque")
    recompute_layers(packed, Recomputation.model_validate({"what": what}))
    compile_layers(packed, backend=counter)  # pyright: ignore[reportArgumentType]
    counts = []
    for lengths in BATCHES:
        run(packed, lengths)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * len(BATCHES)
    assert counts[0] <= 3


def test_a_model_whose_layers_nobody_marked_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Sequential marks no layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
