"""LoRA of fused experts: PEFT keeps the pairs of all experts of a parameter as two long matrices.

A [E·r, in] is expert after expert; B [out, r·E] has, for each of its r columns, one of every expert. Here they are the
experts' own matrices, views of PEFT's: A [E, r, in] and B [E, out, r]. The parameter itself is [E, in, out], or
[E, out, in] where the model says that its experts are not transposed.
"""

from typing import Any

import torch
from torch import nn

from syncline.errors import ConfigError


def is_expert_lora(module: Any) -> bool:
    """Whether PEFT adapts one parameter of what is inside of `module`, and has one adapter for it."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(module, ParamWrapper) and len(module.active_adapters) == 1 and module.num_experts > 1


def expert_pair(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and their scaling."""
    [adapter] = wrapper.active_adapters
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1), wrapper.scaling[adapter]


def with_delta(wrapper: Any, weight: torch.Tensor) -> torch.Tensor:
    """W + scaling·B·A of every expert, in float32, rounded once to W's type."""
    a, b, scaling = expert_pair(wrapper)
    delta = scaling * (b.float() @ a.float())
    delta = delta if wrapper._did_swap_in_out_features else delta.transpose(1, 2)
    return (weight.detach().float() + delta).detach().to(weight.dtype)


def found_parameters(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The parameters that end in one of `targets`, by full name. Raises `ConfigError` for a target without any."""
    names = [name for name, _ in model.named_parameters()]
    found = {target: [name for name in names if name == target or name.endswith(f".{target}")] for target in targets}
    if missing := [target for target in targets if not found[target]]:
        plain = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        others = {name for name, p in model.named_parameters() if p.dim() > 1 and name not in plain}
        ends = sorted({".".join(name.split(".")[-3:]) for name in others})
        raise ConfigError(
            [
                f"model.lora.target_parameters: {', '.join(missing)} is the end of no parameter's name; beside linear "
                f"layers, which are target_modules, there are {', '.join(ends)}"
            ]
        )
    return sorted({name for matched in found.values() for name in matched}, key=names.index)
