"""An adapter merged into its base: safetensors that any engine loads, shown to say what the adapter said.

What is merged is what the bridges publish (`checkpoint_parameters`: LoRA, rsLoRA and DoRA in float32, rounded once).
The proof reads the folder again as an engine would and compares log-probabilities on real text with the adapter beside
its base: rounding makes them differ a little, a wrong or missing adapter as much as base and adapter themselves differ.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.bridges.restart import write_weights
from syncline.config.model_folder import known_settings
from syncline.errors import CheckpointError, ConfigError
from syncline.learner.model import assets_folder, checkpoint_parameters, learner_device, learner_dtype, saved_parameters
from syncline.observe.files import write_atomically
from syncline.offline.adapters import WEIGHTS_FILE, adapted, adapter_settings

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Mean |Δ logprob|, nats: what rounding the merged weights once costs."""
TEXTS = (
    "Janet has 3 boxes of 12 eggs and sells 7 of the eggs. How many are left? 3 * 12 = 36, and 36 - 7 = 29.",
    "The capital of France is Paris. def add(a, b): return a + b",
    "12+7=19",
)
SUMMARY_FILE = "merge.json"


@dataclass(frozen=True, slots=True)
class Merged:
    """`digest` is of the merged weights, as engines and learners compute it. Log-probabilities in nats."""

    base: str
    adapter: str
    kind: str
    digest: str
    num_adapted: int
    num_tokens_compared: int
    mean_abs_diff: float
    """Between the adapter beside its base and the merged weights, tokens weighed by how likely they are."""
    max_abs_diff: float
    adapter_effect: float
    """Mean |Δ logprob| between base and adapter: what a merge that did nothing would differ by."""
    tolerance: float


@torch.no_grad()
def merge(
    base: str,
    adapter: Path,
    out: Path,
    *,
    dtype: str = "auto",
    tolerance: float | None = None,
    any_base_name: bool = False,
    texts: Sequence[str] = TEXTS,
) -> Merged:
    """Writes a loadable folder with `merge.json` at `out`, or nothing.

    Raises `ConfigError` for an adapter of another base, by name or shape, and `CheckpointError` for weights that are
    not finite, or that do not say what the adapter says.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    device = learner_device("auto")
    settings = adapter_settings(adapter, field="--adapter")
    _refuse_other_name(settings, base, any_base_name)
    known_settings(base, field="--base")
    loading: Any = {"dtype": learner_dtype(dtype, device), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **loading).eval()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError([f"--base: {base!r} holds no model that loads: {error}"]) from error
    ids = _tokens(base, texts, model)
    plain = _logprobs(model, ids)
    num_adapted = _refuse_other_shapes(model, adapter)
    peft_model = adapted(model, adapter, field="--adapter").eval()
    wanted = _logprobs(peft_model, ids)
    merged = dict(checkpoint_parameters(peft_model))
    _refuse_broken(merged)
    partial = out.with_name(out.name + ".unproved")
    write_weights(saved_parameters(peft_model), partial, assets=assets_folder(base))
    _copy_tokenizer(adapter, partial)
    found = _logprobs(AutoModelForCausalLM.from_pretrained(partial, **loading).eval(), ids)
    limit = TOLERANCES[model.dtype] if tolerance is None else tolerance
    difference, effect = _difference(wanted, found), _difference(wanted, plain)
    summary = Merged(
        base=base,
        adapter=str(adapter),
        kind=_kind(settings),
        digest=model_digest(parameter_digests(merged.items())),
        num_adapted=num_adapted,
        num_tokens_compared=sum(len(one[0]) for one in ids),
        mean_abs_diff=difference[0],
        max_abs_diff=difference[1],
        adapter_effect=effect[0],
        tolerance=limit,
    )
    _refuse_unproved(summary, partial)
    write_atomically(partial / SUMMARY_FILE, json.dumps(asdict(summary), indent=2) + "\n")
    partial.rename(out)
    return summary


def _refuse_other_name(settings: Mapping[str, Any], base: str, any_base_name: bool) -> None:
    """Folders move, so the last part of the name counts."""
    named = settings.get("base_model_name_or_path")
    if named and not any_base_name and Path(named).name != Path(base).name:
        raise ConfigError(
            [
                f"--base: {base!r} is not {named!r}, which the adapter was trained on; give that one, or, if it only "
                "has another name, --any-base-name"
            ]
        )


def _refuse_other_shapes(model: Any, adapter: Path) -> int:
    """PEFT leaves out what it finds no place for; here every tensor of the adapter must have one, of its shape.

    Returns the number of adapted layers."""
    from safetensors import SafetensorError, safe_open

    path = adapter / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError([f"--adapter: {adapter} has no {path.name}; pickled adapters are not loaded, save it again"])
    modules, layers = dict(model.named_modules()), set[str]()
    faults: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as error:
        raise ConfigError([f"--adapter: {path} cannot be read ({error}); save it again"]) from error
    for key, shape in shapes.items():
        name, _, leaf = key.removeprefix("base_model.model.").partition(".lora_")
        weight = getattr(modules.get(name), "weight", None)
        if not leaf:
            faults.append(f"--adapter: trains {name} whole (modules_to_save), which is not merged")
        elif weight is None:
            faults.append(f"--base: has no {name}, which the adapter adapts")
        elif not _fits(leaf, shape, list(weight.shape)):
            faults.append(f"--base: {name} is {list(weight.shape)}, and the adapter's lora_{leaf} is {shape}")
        layers.add(name)
    if faults:
        raise ConfigError([*faults[:5], *([f"… and {len(faults) - 5} more"] if len(faults) > 5 else [])])
    return len(layers)


def _fits(leaf: str, shape: Sequence[int], weight: Sequence[int]) -> bool:
    """An embedding's matrices lie the other way."""
    if leaf.startswith("embedding"):
        return weight[0 if leaf.endswith("A") else 1] in shape
    if leaf.startswith("A"):
        return shape[-1] == weight[-1]
    return shape[0] == weight[0]


def _refuse_broken(parameters: Mapping[str, torch.Tensor]) -> None:
    if bad := [name for name, tensor in parameters.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{bad[0]} is not finite after the merge ({len(bad)} of {len(parameters)} parameters)")


def _tokens(base: str, texts: Sequence[str], model: Any) -> list[torch.Tensor]:
    from syncline.envs.rendering import load_tokenizer

    tokenizer = load_tokenizer(base)
    return [torch.tensor([ids], device=model.device) for text in texts if len(ids := tokenizer.encode(text)) > 1]


def _logprobs(model: Any, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=one).logits[0].float().log_softmax(-1) for one in ids]


def _difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Mean, weighed by how likely a token is (what is said of those nobody samples matters little), and largest."""
    differences = [((a - b).abs(), a.exp()) for a, b in zip(left, right, strict=True)]
    means = torch.cat([(d * p).sum(-1) for d, p in differences])
    return means.mean().item(), max(d.max().item() for d, _ in differences)


def _refuse_unproved(summary: Merged, folder: Path) -> None:
    if not summary.mean_abs_diff <= summary.tolerance:
        raise CheckpointError(
            f"{folder}: the merged weights differ from the adapter by {summary.mean_abs_diff:.3g} nats a token on "
            f"{summary.num_tokens_compared} tokens, above the tolerance {summary.tolerance:g} (base and adapter "
            f"themselves by {summary.adapter_effect:.3g}); merge in float32, or raise the tolerance if that will do"
        )


def _copy_tokenizer(adapter: Path, out: Path) -> None:
    """The adapter's own where it has one: tokens may have been added for it."""
    if (adapter / "tokenizer_config.json").is_file():
        for path in adapter.glob("*token*"):
            if path.is_file():
                (out / path.name).write_bytes(path.read_bytes())


def _kind(settings: Mapping[str, Any]) -> str:
    if settings.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if settings.get("use_rslora") else "LoRA"
