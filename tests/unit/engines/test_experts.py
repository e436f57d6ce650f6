"""Fused experts as vLLM's ranks hold them, against the whole of transformers' layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_digests import combined

from syncline.bridges.receipt import parameter_digests
from syncline.engines.vllm.experts import expert_pieces
from syncline.errors import SyncError

EXPERTS, INTERMEDIATE, HIDDEN = 3, 8, 4
LAYER = "model.layers.0.mlp.experts"


def layer(rank: int, num_ranks: int, **changes: Any) -> Any:
    """What `expert_pieces` asks of vLLM's `RoutedExperts`."""
    values = {"backend": "TRITON", "use_ep": False, "padded": INTERMEDIATE // num_ranks} | changes
    parallel = SimpleNamespace(tp_rank=rank, tp_size=num_ranks, use_ep=values["use_ep"])
    config = SimpleNamespace(
        moe_parallel_config=parallel,
        intermediate_size_per_partition_unpadded=values["padded"],
        hidden_dim_unpadded=HIDDEN,
    )
    backend = SimpleNamespace(name=values["backend"])
    return SimpleNamespace(
        moe_config=config,
        quant_method=SimpleNamespace(unquantized_backend=backend),
        local_num_experts=EXPERTS,
        global_num_experts=EXPERTS,
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ranks_pieces_are_the_fused_experts(num_ranks: int) -> None:
    """Each rank's `w13` is its rows of the gate, then its rows of the up projection."""
    gate, up = torch.randn(2, EXPERTS, INTERMEDIATE, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    ranks = []
    for rank in range(num_ranks):
        w13 = torch.cat([gate.chunk(num_ranks, 1)[rank], up.chunk(num_ranks, 1)[rank]], 1)
        w2 = down.chunk(num_ranks, 2)[rank]
        module = layer(rank, num_ranks)
        pieces = [
            *expert_pieces(f"{LAYER}.routed_experts.w13_weight", w13, module),
            *expert_pieces(f"{LAYER}.routed_experts.w2_weight", w2, module),
        ]
        ranks.append(pieces)
    whole = {f"{LAYER}.gate_up_proj": torch.cat([gate, up], 1), f"{LAYER}.down_proj": down}
    assert combined(ranks) == parameter_digests(whole.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"backend": "FLASHINFER_CUTLASS"},
            r"repacks experts for its FLASHINFER_CUTLASS .*moe_backend: triton",
        ),
        ({"use_ep": True}, "enable_expert_parallel"),
        ({"padded": INTERMEDIATE - 1}, r"pads or changes experts of shape \(14, 4\) to \[3, 16, 4\]"),
    ],
)
def test_other_layouts_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    with pytest.raises(SyncError, match=rf"experts\.w13_weight: .*{named}"):
        list(expert_pieces(f"{LAYER}.w13_weight", w13, layer(0, 1, **changes)))
