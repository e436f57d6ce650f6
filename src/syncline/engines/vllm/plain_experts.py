"""MXFP4 experts in plain torch, for vLLM's CPU build: with any instruction set, and with adapters.

vLLM's own need AMX and serve no adapters. These read blocks and scales as they were loaded, widen the experts that a
batch hits, and add each token's adapter; right, and slow. Gate and up rows take turns, and the gated activation is
GPT-OSS's: (up + 1) · gate · σ(α gate), both clamped.
"""

from typing import Any

import torch

from syncline.engines.vllm.packed_experts import GPT_OSS_MXFP4

_ALPHA, _LIMIT = 1.702, 7.0


def register_plain_experts() -> None:
    """Puts them in the place of vLLM's own, in a process of the CPU build."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config

    method: Any = _method()

    class PlainMxfp4Config(GptOssMxfp4Config):
        def _make_moe_method(self, moe: Any) -> Any:
            return method(moe)

    register_quantization_config(GPT_OSS_MXFP4)(PlainMxfp4Config)


def _method() -> type:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend, make_mxfp4_moe_kernel
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

    experts = _experts()

    class PlainMethod(GptOssMxfp4MoEMethod):
        def __init__(self, moe: Any) -> None:
            FusedMoEMethodBase.__init__(self, moe)
            self.weight_dtype = GPT_OSS_MXFP4
            self.mxfp4_backend, self.experts_cls = Mxfp4MoeBackend.CPU, experts
            self.moe_kernel = None

        def process_weights_after_loading(self, layer: Any) -> None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            assert self.moe_quant_config is not None
            self.moe_kernel = make_mxfp4_moe_kernel(
                moe_quant_config=self.moe_quant_config,
                moe_config=self.moe,
                mxfp4_backend=self.mxfp4_backend,
                experts_cls=experts,
                routing_tables=layer._expert_routing_tables(),
            )

    return PlainMethod


def _experts() -> type:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    class PlainExperts(LoRAExpertsMixin, CPUExpertsMxfp4):
        @staticmethod
        def _supports_current_device() -> bool:
            return True

        def apply(
            self,
            output: Any,
            hidden_states: Any,
            w1: Any,
            w2: Any,
            topk_weights: Any,
            topk_ids: Any,
            *_: Any,
            **__: Any,
        ) -> None:
            output.zero_()
            config, context = self.quant_config, self._lora_context
            scales: Any = (self.w1_scale, self.w2_scale)
            for expert in topk_ids.unique().tolist():
                rows, choice = torch.where(topk_ids == expert)
                x = hidden_states[rows].float()
                inner = linear(x, widened(w1[expert], scales[0][expert]), config.w1_bias, expert)
                inner += adapted(x, rows, expert, context, "w13")
                gated = gate(inner)
                out = linear(gated, widened(w2[expert], scales[1][expert]), config.w2_bias, expert)
                out += adapted(gated, rows, expert, context, "w2")
                output.index_add_(0, rows, (out * topk_weights[rows, choice, None]).to(output.dtype))

    return PlainExperts


def widened(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`[out, in / 2]` and `[out, in / 32]` uint8 to `[out, in]` float32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks.unflatten(-1, (-1, 16))[None], scales[None])[0].T.float()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
    return x @ weight.T + (0 if bias is None else bias[expert].float())


def gate(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner[..., ::2].clamp(max=_LIMIT), inner[..., 1::2].clamp(-_LIMIT, _LIMIT)
    return (up + 1) * gate * torch.sigmoid(_ALPHA * gate)


def adapted(x: torch.Tensor, rows: torch.Tensor, expert: int, context: Any, matrix: str) -> torch.Tensor | float:
    """What each row's adapter adds: `x` are the inputs of `rows`, the tokens of the batch that the expert computes."""
    if context is None:
        return 0.0
    [a], [b] = (getattr(context, f"{matrix}_lora_{side}_stacked") for side in "ab")
    slots = context.punica_wrapper.token_lora_indices[rows]
    added = x.new_zeros(len(x), b.shape[2])
    for slot in slots.unique().tolist():
        if slot >= 0:
            own = slots == slot
            added[own] = x[own] @ a[slot, expert].float().T @ b[slot, expert].float().T
    return added
