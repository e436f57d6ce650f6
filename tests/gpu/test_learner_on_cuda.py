"""What only a GPU's own kernels can show: packed FlashAttention, bf16 log-probabilities, the fused optimizer."""

import copy

import pytest
import torch
from packed_on_cuda import LENGTHS, models, sample
from rank_digests import combined, combined_together

from syncline.bridges.adapter import AdapterLayout, LoraLayer
from syncline.bridges.digest import piece_sums, tensor_digest
from syncline.bridges.manifest import Shard
from syncline.bridges.measure import LearnerDigests
from syncline.bridges.receipt import parameter_digests, whole
from syncline.config.schema import Optimizer
from syncline.errors import SyncError
from syncline.learner.logprobs import token_logprobs, token_loss
from syncline.learner.model import Scorer
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32, join_master
from syncline.learner.packing import pack_samples


def test_packed_scores_and_gradients_follow_the_plain_fp32_forward() -> None:
    packed, exact = models()
    accumulate_fp32(packed)
    samples = [sample(length, i) for i, length in enumerate(LENGTHS)]
    for batch in pack_samples(samples, token_budget=1024):
        logprobs, _ = Scorer(1.0, 256).score(packed, batch.to("cuda"))
        logprobs.sum().backward()
    for one in samples:
        ids = torch.tensor([one.token_ids], device="cuda")
        scores = exact(ids).logits[0].log_softmax(-1)[3:-1].gather(1, ids[0, 4:, None])
        scores.sum().backward()
    pairs = zip(packed.named_parameters(), exact.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        error = (ours.main_grad - theirs.grad).norm() / theirs.grad.norm()  # type: ignore[attr-defined]
        assert error < 0.03, f"{name}: relative gradient error {error:.4f}"


def test_split_master_follows_torchs_fused_fp32_adamw_bit_for_bit() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(512, 768, device="cuda", dtype=torch.bfloat16))
    master = torch.nn.Parameter(weight.detach().float())
    ours = SplitMasterAdamW([("w", weight)], Optimizer(max_grad_norm=1e9, weight_decay=0.1))
    theirs = torch.optim.AdamW([master], lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    before = weight.detach().clone()
    for _ in range(60):
        gradient = torch.randn_like(weight)
        weight.grad, master.grad = gradient, gradient.float()
        ours.step(1e-6)
        theirs.step()
    joined = join_master(weight.detach(), ours.state_dict()["w.low_bits"])
    assert torch.equal(joined, master.detach())
    assert not torch.equal(joined, before.float()), "the updates were lost"


def test_logits_of_a_large_vocabulary_never_exist_at_once() -> None:
    rows, vocabulary = 8192, 151_936
    head = torch.nn.Linear(896, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(rows, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    token_logprobs(hidden, head, labels, temperature=1.0, chunk=1024)[0].sum().backward()
    peak = torch.cuda.max_memory_allocated() - held
    assert peak < rows * vocabulary * 4, f"{peak / 2**30:.1f} GiB: as much as the logits themselves"


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_a_chunk_at_a_time_has_the_gradients_of_all_at_once(trained: bool) -> None:
    rows, vocabulary = 2500, 151_936
    head = torch.nn.Linear(896, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(trained)
    accumulate_fp32(head)
    hidden = torch.randn(rows, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels, weights = torch.randint(vocabulary, (rows,), device="cuda"), torch.rand(rows, device="cuda")
    found = []
    for at_once in (False, True):
        hidden.grad = None
        if at_once:
            token_loss(hidden, head, labels, lambda a, r: (weights[r] * a).sum(), temperature=0.9, chunk=1024)[
                0
            ].backward()
        else:
            (weights * token_logprobs(hidden, head, labels, temperature=0.9, chunk=1024)[0]).sum().backward()
        found.append([x for x in (hidden.grad, getattr(head.weight, "main_grad", None)) if x is not None])
        if trained:
            head.weight.main_grad = None  # type: ignore[assignment]
    for ours, expected in zip(found[1], found[0], strict=True):
        assert (ours.float() - expected.float()).norm() / expected.float().norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1000, 896), (33, 7), (5,), (70_000, 512)])
def test_the_digest_is_the_same_on_either_device(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(*shape).to(dtype)
    assert tensor_digest(tensor.cuda()) == tensor_digest(tensor)
    assert tensor_digest(tensor[1:].cuda(), offset=tensor[0].numel()) == tensor_digest(
        tensor[1:], offset=tensor[0].numel()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_changed_element_changes_the_digest_on_the_gpu(dtype: torch.dtype) -> None:
    tensor = torch.randn(1000, 896).to(dtype)
    changed = copy.deepcopy(tensor)
    changed[7, 7] += 1
    assert tensor_digest(changed.cuda()) != tensor_digest(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(1000, 896), (64, 9728), (33, 14), (3, 16, 20)])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_digests_of_pieces_on_the_gpu_add_up(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    """Halves along the first dimension, and columns of a row-major matrix, whose places are not contiguous."""
    tensor = (torch.randn(*shape) * 64).to(dtype)
    ranks, first = [], 0
    for half in tensor.cuda().tensor_split(2, dim):
        start = [0] * len(shape)
        start[dim], first = first, half.shape[dim]
        ranks.append([("w", Shard(half, shape, tuple(start)))])
    assert combined(ranks) == parameter_digests([("w", tensor)])


@pytest.mark.parametrize(("shape", "dim"), [((32, 896), 1), ((896, 32), 0), ((5, 24), 1), ((18944, 32), 0)])
def test_an_adapters_digests_on_the_gpu_are_those_of_the_host_and_of_its_pieces(shape: tuple, dim: int) -> None:
    torch.manual_seed(0)
    layer = LoraLayer(torch.randn(4, 8), torch.randn(12, 4), 2.0)
    layers = {"small": layer, "w": LoraLayer(torch.randn(shape), torch.randn(shape), 0.5)}
    layout = AdapterLayout.of(layers, "bfloat16")
    found = []
    for device in ("cpu", "cuda"):
        packed = layout.on(layout.new_buffer(torch.device(device)))
        packed.pack({n: LoraLayer(one.a.to(device), one.b.to(device), one.scaling) for n, one in layers.items()})
        found.append(packed.digests())
    assert found[0] == found[1]
    tensor, half = layers["w"].a.bfloat16().cuda(), shape[dim] // 2
    parts = tensor.split(half, dim)[:2] if shape[dim] % 2 == 0 else (tensor,)
    starts = [tuple(i * half if d == dim else 0 for d in (0, 1)) for i in range(len(parts))]
    ranks = [[("w.lora_A.weight", Shard(p, shape, s))] for p, s in zip(parts, starts, strict=True)]
    assert combined_together(ranks) == {"w.lora_A.weight": found[0]["w.lora_A.weight"]}
    layers["w"].b[1, 1] = float("inf")
    packed.pack({n: LoraLayer(one.a.cuda(), one.b.cuda(), one.scaling) for n, one in layers.items()})
    with pytest.raises(SyncError, match=r"^w\.lora_B\.weight is not finite \(1 of 4 tensors\)"):
        packed.digests()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1000, 896), (33, 7)], ids=["words of several", "a word an element"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted_on_the_gpu(dtype: torch.dtype, shape: tuple[int, ...], value: float) -> None:
    largest = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    broken = -largest
    broken[3, 5] = broken[20, 6] = value
    named = [("largest", whole(largest.cuda())), ("broken", whole(broken.cuda()))]
    assert piece_sums(named).num_broken == [0, 2]


def test_a_model_measured_again_is_read_again() -> None:
    """From the second time on the launch is prepared: same table, new bits."""
    model = torch.nn.Sequential(torch.nn.Linear(896, 130), torch.nn.Linear(7, 5).bfloat16()).cuda()
    digests = LearnerDigests(lambda m: ((name, whole(p)) for name, p in m.named_parameters()))
    for _ in range(3):
        assert digests.of(model) == parameter_digests((name, p.cpu()) for name, p in model.named_parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
