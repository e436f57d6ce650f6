"""The policy: a Hugging Face causal language model, whole or with a LoRA adapter, and its checkpoint parameters."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from syncline.bridges.manifest import Shard
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.saved import model_class
from syncline.config.model_folder import known_settings
from syncline.config.schema import Learner, Lora, Model
from syncline.errors import ConfigError
from syncline.learner.attention import ATTENTION, WRITTEN_OUT, check_attention, refuse_own_attention
from syncline.learner.attention_choice import choose_attention
from syncline.learner.data_parallel import in_parts, shard_over, with_parameters
from syncline.learner.expert_adapter import found_parameters, is_expert_lora, with_delta
from syncline.learner.layers import compile_layers, recompute_layers, train_as_sampled
from syncline.learner.logprobs import LossOf, token_logprobs, token_loss
from syncline.learner.mxfp4 import dequantised, in_one_type
from syncline.learner.packed import settings_of, unpacked_model
from syncline.learner.packing import PackedBatch
from syncline.learner.parts import adapter_targets, family_of_model, freeze_parts, trains_beside_adapter
from syncline.learner.places import gathered, shard, wholes
from syncline.learner.tensor_parallel import parallelize
from syncline.learner.vision import Vision, refuse_family, sees

log = logging.getLogger("syncline.model")


def learner_device(asked: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → the device. Raises when CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError(["learner.device: 'cuda', but torch sees no NVIDIA GPU; set it to cpu, or mend the driver"])
    return torch.device("cuda" if asked != "cpu" and available else "cpu")


def learner_dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]


def load_model(
    config: Model,
    *,
    device: torch.device,
    running: Learner | None = None,
    ranks: Ranks = ONE_RANK,
    lies_on: torch.device | None = None,
) -> nn.Module:
    """The model to train, on `device`, in training mode; with several ranks, this rank's pieces of it. `running` says
    how its layers run. Of one rank it may lie elsewhere, `lies_on`, until somebody brings it there.

    Raises `ConfigError` for a path that holds no model, and for one that cannot be split.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    running = running or Learner()
    dtype = learner_dtype(config.dtype, device)
    known_settings(config.path)
    try:
        settings = without_dropout(AutoConfig.from_pretrained(config.path))
        check_attention(settings.get_text_config())
        attention: Any = choose_attention(running.attention, settings, device=device, dtype=dtype)
        if attention in (ATTENTION, WRITTEN_OUT):
            refuse_own_attention(settings)
        if sees(settings):  # a tower packs its pictures in its own way
            refuse_family(settings, num_ranks=ranks.world_size)
            attention = {"": attention, "text_config": attention, "vision_config": "sdpa"}
        if settings_of(settings):
            folder = assets_folder(config.path)
            model = unpacked_model(settings, folder, dtype=dtype, attn_implementation=attention)
        else:
            model = model_class(settings).from_pretrained(
                config.path, config=settings, dtype=dtype, attn_implementation=attention, **dequantised(settings)
            )
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise ConfigError([f"model.path: {config.path!r} cannot be trained: {error}"]) from error
    refuse_unknown_logits(model.config)
    model.config.use_cache = False
    if not ranks.split_data:
        parallelize(model, ranks)
        model = in_one_type(model, dtype).to(lies_on or device)  # pyright: ignore[reportArgumentType]
    family = family_of_model(model)
    if config.lora:
        model = add_lora(model, config.lora, targets=adapter_targets(model, config, config.lora))
    freeze_parts(model, config, family)
    if ranks.split_data:
        shard_over(causal_lm(model), ranks, sum_in=torch.float32 if running.gradients == "float32" else None)
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    run_layers_as(running, model, device=device, ranks=ranks)
    log.info("Loaded policy model dtype=%s", dtype)
    return train_as_sampled(model)


def run_layers_as(running: Learner, model: nn.Module, *, device: torch.device, ranks: Ranks = ONE_RANK) -> None:
    """What is kept for the backward pass, and whether layers are compiled: `auto` where that was seen to pay, for
    dense layers that a GPU has whole while they compute (FSDP gathers them; the compiler knows no split ones), unless
    torch is to be deterministic: the compiler splits sums by the size of the first batch that a process sees."""
    recompute_layers(model, running.recomputation)
    whole = ranks.world_size == 1 or ranks.split_data
    pays = device.type == "cuda" and whole and not _has_experts(causal_lm(model).config)
    free = not torch.are_deterministic_algorithms_enabled()
    if running.compile == "on" or (running.compile == "auto" and pays and free):
        compile_layers(model)


def _has_experts(config: Any) -> bool:
    """Whose sizes differ with every token."""
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def without_dropout(config: Any) -> Any:
    """The engine samples without dropout, so the policy that is trained has none; some families ship with 0.1."""
    for field, value in vars(config).items():
        if field.endswith(("drop", "dropout", "dropout_prob")) and isinstance(value, float):
            setattr(config, field, 0.0)
        elif isinstance(value, PreTrainedConfig):
            without_dropout(value)
    return config


def add_lora(model: nn.Module, lora: Lora, *, targets: str | list[str] | None = None) -> nn.Module:
    """The model with a fresh adapter; only the adapter trains. Zero matched targets is an error listing what exists."""
    from peft import LoraConfig, get_peft_model

    if targets is None:
        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    parameters = found_parameters(model, lora.target_parameters)
    if lora.target_parameters:
        log.info("LoRA target parameters enumerated (%d): %s", len(parameters), ", ".join(parameters))
    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes any number)
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, adapter)
    except ValueError as error:
        linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        fault = f"model.lora.target_modules: {targets!r} matches no layer; there are {', '.join(sorted(linear))}"
        raise ConfigError([fault]) from error
    _refuse_unpublishable(causal_lm(model))
    names = [name for name, _ in trainable_parameters(peft_model)]
    more = f" … (+{len(names) - 20} more)" if len(names) > 20 else ""
    log.info("Trainable LoRA parameters (%d): %s%s", len(names), ", ".join(names[:20]), more)
    return peft_model


def _refuse_unpublishable(lm: Any) -> None:
    """An adapter of an end that no checkpoint could say: it would be trained, and what is published would lack it."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    for end, refused, why in (
        (embedding, True, "is the input embedding, whose adapter is not merged"),
        (head, head.weight is embedding.weight, "is the embedding's weight too, of which an engine has one"),
    ):
        if refused and hasattr(end, "lora_A"):
            name = next(name for name, module in lm.named_modules() if module is end).rpartition(".")[2]
            raise ConfigError([f"model.lora.target_modules: {name!r} {why}; leave it out"])


def refuse_unknown_logits(config: Any) -> None:
    """Families that scale their logits need that in `token_logprobs` too; until then they are refused by name."""
    for field in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            fault = f"model.path: {config.model_type} scales its logits ({field} = {getattr(config, field)})"
            raise ConfigError([f"{fault}, which the learner does not do yet; choose another model"])


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model inside, with or without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


def vocabulary_size(model: nn.Module) -> int:
    return causal_lm(model).config.get_text_config().vocab_size


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def checkpoint_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under its checkpoint name, adapters merged into fresh tensors: the trained base never moves.

    Merged weights are V = W + scale·B·A, for DoRA m·V/‖V‖ by rows (Liu et al. 2024, "DoRA", eq. 5), computed in fp32
    and rounded once to W's type.
    """
    lm = causal_lm(model)
    for prefix, module in lm.named_modules():
        if ".lora_" in prefix or "lora_" in prefix.split(".")[0]:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}".replace(".base_layer", "")
            if _is_tied_copy(lm, name):
                continue
            owner = _adapted_by(lm, prefix, leaf)
            if owner is not None:
                yield name, with_delta(owner, parameter) if is_expert_lora(owner) else _merged(owner, parameter)
            else:
                yield name, parameter


def checkpoint_shards(model: nn.Module) -> Iterator[tuple[str, Shard]]:
    """As `checkpoint_parameters`, with this rank's piece of each."""
    return ((name, shard(parameter)) for name, parameter in checkpoint_parameters(model))


def checkpoint_wholes(model: nn.Module, ranks: Ranks = ONE_RANK) -> Iterable[tuple[str, torch.Tensor]]:
    """As `checkpoint_parameters`, whole on every rank, one at a time; all ranks must ask together, to the end."""
    if ranks.split_data:
        return ((name, gathered(parameter)) for name, parameter in checkpoint_parameters(model))
    return wholes(checkpoint_shards(model), ranks)


def saved_parameters(model: nn.Module, ranks: Ranks = ONE_RANK) -> Iterable[tuple[str, torch.Tensor]]:
    """`checkpoint_parameters` as the family's files name and cut them, which is what engines load: transformers fuses
    experts, and renames some layers, in memory alone. Of a model split over ranks the wholes, one at a time."""
    from transformers.core_model_loading import revert_weight_conversion

    lm, named = causal_lm(model), checkpoint_wholes(model, ranks)
    if ranks.world_size == 1:
        return revert_weight_conversion(lm, dict(named)).items()
    return (saved for name, whole in named for saved in revert_weight_conversion(lm, {name: whole}).items())


def _adapted_by(lm: Any, prefix: str, leaf: str) -> Any | None:
    """The LoRA layer around the module at `prefix` that adapts its parameter `leaf`; PEFT nests one a parameter."""
    while prefix.endswith(".base_layer"):
        prefix = prefix.removesuffix(".base_layer")
        owner = lm.get_submodule(prefix)
        if hasattr(owner, "lora_A") and leaf == getattr(owner, "parameter_name", "weight"):
            return owner
    return None


def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    merged = gathered(weight).float()
    for adapter in layer.active_adapters:
        if layer.lora_bias.get(adapter):
            raise ConfigError([f"the adapter's own bias (lora_bias) of {layer} is not merged; train without it"])
        a, b = (gathered(lora[adapter].weight).float() for lora in (layer.lora_A, layer.lora_B))
        merged = merged + layer.scaling[adapter] * (b @ a)
        if adapter in layer.lora_magnitude_vector:
            magnitude = gathered(layer.lora_magnitude_vector[adapter].weight).float()
            merged = merged * (magnitude / merged.norm(dim=1))[:, None]
    return merged.detach().to(weight.dtype)


def _is_tied_copy(lm: Any, name: str) -> bool:
    return name == "lm_head.weight" and lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@dataclass(frozen=True, slots=True)
class Scorer:
    """How the learner turns a packed batch into log-probabilities of the sampled tokens."""

    temperature: float
    chunk_tokens: int
    vision: Vision | None = None
    """Of a model that takes images; without it a batch that shows some is refused."""

    def score(self, model: nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """`(logprobs [N], entropy [N])` of the batch's N sampled tokens, at the sampling temperature."""
        lm = causal_lm(model)
        return with_parameters(lm, lambda: token_logprobs(*self._hidden(lm, batch), batch.labels, **self._how(lm)))

    def loss(self, model: nn.Module, batch: PackedBatch, loss_of: LossOf) -> tuple[torch.Tensor, ...]:
        """`(loss, logprobs [N], entropy [N])`, the first to be called `backward` on: see `token_loss`."""
        lm = causal_lm(model)
        return with_parameters(lm, lambda: token_loss(*self._hidden(lm, batch), batch.labels, loss_of, **self._how(lm)))

    def _hidden(self, lm: Any, batch: PackedBatch) -> tuple[torch.Tensor, nn.Module]:
        """The hidden states that predict, `[N, H]`, and the head that turns them into logits."""
        if self.vision is not None:
            told = self.vision.inputs(lm, batch)
        elif any(batch.images):
            raise ConfigError([f"model.path: {lm.config.model_type} takes no images, and the batch shows some"])
        else:
            told = {"input_ids": batch.token_ids[None], "position_ids": batch.position_ids[None]}
        hidden = lm.get_decoder()(use_cache=False, **told, **batch.attention_kwargs()).last_hidden_state[0]
        return hidden.index_select(0, batch.predict_index), lm.get_output_embeddings()

    def _how(self, lm: Any) -> dict[str, Any]:
        softcap = getattr(lm.config, "final_logit_softcapping", None)
        return {"temperature": self.temperature, "chunk": self.chunk_tokens, "softcap": softcap}

    @torch.no_grad()
    def score_without_grad(self, model: nn.Module, batch: PackedBatch) -> torch.Tensor:
        """The log-probabilities alone, without an adapter's dropout: the engine samples without, and the random numbers
        are those of training."""
        noisy = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
        for module in noisy:
            module.eval()
        try:
            return self.score(model, batch)[0]
        finally:
            for module in noisy:
                module.train()


@dataclass(frozen=True, slots=True)
class Reference:
    """The policy before training: a frozen second model, or the adapter switched off at no memory."""

    model: nn.Module
    disable: Any = None

    @classmethod
    def of(
        cls, policy: nn.Module, config: Model, *, running: Learner, device: torch.device, ranks: Ranks
    ) -> "Reference":
        if config.lora and not trains_beside_adapter(config):
            return cls(policy, policy.disable_adapter)
        return cls(load_model(config, device=device, running=running, ranks=ranks).requires_grad_(False).eval())

    @contextmanager
    def switched(self) -> Iterator[None]:
        """PEFT freezes an adapter that is off: the parts of it, not what is gathered, or it would stay frozen."""
        in_parts(causal_lm(self.model))
        with self.disable() if self.disable else nullcontext():
            yield


def assets_folder(path: str) -> Path:
    """The folder with the model's config and tokenizer files; a hub name resolves to its cached snapshot. Raises
    `ConfigError` for a name that is neither, and for a config.json that cannot be read."""
    from huggingface_hub import snapshot_download

    known_settings(path)
    try:
        return Path(path) if Path(path).is_dir() else Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError) as error:
        fault = f"{path!r} is no folder here, and the hub's cache has no copy ({error})"
        raise ConfigError([f"model.path: {fault}; give a folder, or fetch the model: `hf download NAME`"]) from error
