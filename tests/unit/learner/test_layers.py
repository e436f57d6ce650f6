"""Recomputed and compiled layers give what plain ones give, and no micro-batch's size compiles them again."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, library, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import init_device_mesh
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Qwen2Config

from syncline.bridges.ranks import DATA_PARALLEL, ONE_RANK, TENSOR_PARALLEL, Ranks
from syncline.config.schema import Learner, Lora, Recomputation
from syncline.errors import ConfigError
from syncline.learner import layers
from syncline.learner import model as learner_model
from syncline.learner.attention import _flash, register_attention
from syncline.learner.data_parallel import shard_over
from syncline.learner.layers import compile_layers, decoder_layers, recompute_layers
from syncline.learner.model import add_lora, causal_lm, run_layers_as

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
    return logits.detach(), torch.cat([p.grad.flatten() for p in packed.parameters() if p.grad is not None])


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
    *((what, False) for what in ("none", "selective", "attention", "full")),
    ("full", True),
    *(pytest.param(what, True, marks=pytest.mark.slow) for what in ("none", "selective", "attention")),
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
def attend(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return query * key + value, query.sum(-1)


@library.custom_op("test::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient * key, gradient * query, gradient.clone()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1])


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


attend.register_autograd(
    lambda ctx, gradient, _: (*attend_backward(gradient.contiguous(), *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output),
)


def opaque_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """As a GPU's kernels look to the compiler: one operator that is told the borders and the longest length."""
    shared = query.shape[1] // key.shape[1]
    heads = (query, *(x.repeat_interleave(shared, dim=1) for x in (key, value)))
    out, _ = attend(
        *(x[0].transpose(0, 1).contiguous() for x in heads), kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    )
    return out.unsqueeze(0), None


@pytest.fixture
def opaque(monkeypatch: pytest.MonkeyPatch) -> str:
    AttentionInterface.register("opaque", opaque_attention)
    AttentionMaskInterface.register("opaque", lambda *args, **kwargs: None)
    monkeypatch.setattr(layers, "_attention", lambda: [torch.ops.test.attend.default])
    return "opaque"


@pytest.mark.parametrize("what", ["none", "full"])
def test_ten_layers_and_five_sizes_are_compiled_as_often_as_one_layer_and_one_size(what: str, opaque: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    packed = model(opaque)
    recompute_layers(packed, Recomputation.model_validate({"what": what}))
    compile_layers(packed, backend=counter)  # pyright: ignore[reportArgumentType]
    counts = []
    for lengths in BATCHES:
        run(packed, lengths)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * len(BATCHES)
    assert counts[0] <= 3


class Graphs:
    """A backend that keeps what a layer's forward and backward passes compute, as the partitioner split them."""

    def __init__(self) -> None:
        self.backward: Counter[str] = Counter()
        keep = aot_autograd(
            fw_compiler=boxed_nop, bw_compiler=self._keep, partition_fn=min_cut_rematerialization_partition
        )
        self.compile: Any = lambda graph, inputs: keep(graph, inputs)

    def _keep(self, graph: Any, inputs: Any) -> Any:
        names = (str(node.target).split(".")[1] for node in graph.graph.nodes if "." in str(node.target))
        self.backward.update("product" if name in ("mm", "addmm") else name for name in names)
        return boxed_nop(graph, inputs)


def compiled(what: str, attention: str) -> tuple[Any, Graphs]:
    packed, graphs = model(attention), Graphs()
    recompute_layers(packed, Recomputation.model_validate({"what": what}))
    compile_layers(packed, backend=graphs.compile)
    return packed, graphs


def test_a_compiled_layer_computes_again_what_was_not_kept_and_never_its_last_product(opaque: str) -> None:
    """Of the seven products the backward pass has two each, and all but the last again."""
    expected = {"none": (14, 0), "selective": (14, 0), "attention": (20, 0), "full": (20, 1)}
    plain, kept = model(opaque), {}
    for what, (products, attentions) in expected.items():
        packed, graphs = compiled(what, opaque)
        for result, exact in zip(run(packed, BATCHES[0]), run(plain, BATCHES[0]), strict=True):
            torch.testing.assert_close(result, exact, atol=1e-6, rtol=1e-4)
        assert (graphs.backward["product"], graphs.backward["attend"]) == (products, attentions), what
        kept[what] = Kept.by(packed)
    assert kept["selective"] < 0.8 * kept["none"]
    assert kept["full"] < kept["attention"] < 0.4 * kept["selective"]


@pytest.fixture
def one_rank_of_data() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, init_device_mesh("cpu", (1,), mesh_dim_names=(DATA_PARALLEL,)), DATA_PARALLEL)
    dist.destroy_process_group()


@pytest.mark.parametrize(("what", "products"), [("none", 14), ("full", 20)])
def test_a_sharded_layer_is_compiled_whole_too(what: str, products: int, opaque: str, one_rank_of_data: Ranks) -> None:
    """FSDP's hooks stay outside: inside of a recomputation they would leave the whole layer uncompiled."""
    counters.clear()
    packed, graphs = model(opaque), Graphs()
    shard_over(packed, one_rank_of_data, sum_in=None)
    recompute_layers(packed, Recomputation.model_validate({"what": what}))
    compile_layers(packed, backend=graphs.compile)
    run(packed, BATCHES[0])
    assert not counters["graph_break"]
    assert graphs.backward["product"] == products


@pytest.mark.parametrize(
    ("ranks", "device", "compiled"),
    [
        (ONE_RANK, "cuda", True),
        (ONE_RANK, "cpu", False),
        (Ranks(1, 2, None, DATA_PARALLEL), "cuda", True),
        (Ranks(1, 2, None, TENSOR_PARALLEL), "cuda", False),
    ],
)
def test_auto_compiles_dense_layers_that_a_gpu_gathers(
    monkeypatch: pytest.MonkeyPatch, ranks: Ranks, device: str, compiled: bool
) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(learner_model, "compile_layers", asked.append)
    run_layers_as(Learner(), model(), device=torch.device(device), ranks=ranks)
    assert bool(asked) is compiled


def test_auto_leaves_layers_alone_that_must_repeat_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(learner_model, "compile_layers", asked.append)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run_layers_as(Learner(), model(), device=torch.device("cuda"))
    assert not asked


def test_a_gpus_attention_is_one_operator_to_the_compiler_and_is_kept() -> None:
    """torch's own, compiled as on a GPU; there is no kernel here that could run it."""

    def on_gpu(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        borders, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        return _flash(query, key, value, borders, longest, window=None, scale=kwargs["scaling"]), None

    AttentionInterface.register("on_gpu", on_gpu)
    AttentionMaskInterface.register("on_gpu", lambda *args, **kwargs: None)
    counters.clear()
    packed, graphs = compiled("attention", "on_gpu")
    with pytest.raises(RuntimeError, match="_flash_attention_forward"):
        run(packed.to(torch.bfloat16), BATCHES[0])
    assert not counters["graph_break"]
    assert (graphs.backward["product"], graphs.backward["_varlen_attn"]) == (20, 0)
    assert graphs.backward["_varlen_attn_backward"] == 1


@pytest.mark.slow
def test_a_compiled_layer_with_dropout_draws_the_same_when_it_is_computed_again(opaque: str) -> None:
    gradients = []
    for what in ("none", "full"):
        packed = add_lora(model(opaque), Lora(target_modules=("q_proj", "down_proj"), dropout=0.5))
        for name, parameter in packed.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        recompute_layers(packed, Recomputation.model_validate({"what": what}))
        compile_layers(causal_lm(packed), backend="aot_eager")
        torch.manual_seed(0)
        gradients.append(run(packed, BATCHES[0])[1])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_a_model_whose_layers_nobody_marked_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Sequential marks no layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
