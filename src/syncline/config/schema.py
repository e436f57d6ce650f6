"""The run's configuration: every field, its unit and its default, written once.

Frozen, unknown keys refused. Field rules live here; rules between sections live in `rules.py`, which lists
every fault at once. Nothing rewrites a value after loading.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Run(Section):
    dir: str
    """Everything the run writes: `runs/demo`."""
    seed: NonNegativeInt = 0
    num_steps: PositiveInt
    groups_per_step: PositiveInt
    """Tasks an optimizer step learns from."""
    rollouts_per_group: Annotated[int, Field(ge=2)] = 8
    """Attempts at each task: the G of GRPO."""
    max_staleness: NonNegativeInt = 0
    """Oldest policy a token may come from, in versions behind the one being trained. 0 is on-policy."""
    max_refills: NonNegativeInt = 0
    """Dynamic sampling (DAPO): groups whose rewards are all equal teach nothing and are replaced by freshly sampled
    tasks, at most this many a step; any more are trained on as they are, and counted. 0: none is replaced."""
    deterministic: bool = False
    """Asks torch for deterministic kernels, so that a resumed run repeats bit for bit."""


class Lora(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    """Matrices that are no layer of their own, as fused experts have them, by the end of their names:
    `[mlp.experts.gate_up_proj, mlp.experts.down_proj]`. One that no layer has is an error."""
    rslora: bool = False
    dora: bool = False
    """DoRA: rows of the adapted weights have magnitudes of their own. Reaches an engine merged, by `restart` or
    `broadcast`."""


Fate = Literal["trained", "adapted", "frozen"]


class Parts(Section):
    """What becomes of the parts of a vision-language model: all its weights train, it gets `model.lora`'s adapter, or
    it stays as it is."""

    language: Literal["auto"] | Fate = "auto"
    """auto: adapted with `model.lora`, trained without."""
    aligner: Fate = "frozen"
    """What maps the tower's features to the language model's."""
    vision: Fate = "frozen"


class Model(Section):
    path: str
    """A local folder or a Hugging Face hub name."""
    tokenizer: str | None = None
    """Default: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU. The engine samples in the same type."""
    lora: Lora | None = None
    """Absent: every parameter is trained."""
    parts: Parts = Parts()
    """For vision-language models: see multimodal.md."""
    max_length: PositiveInt = 2048
    """Prompt and completion together, in tokens: the engine's context."""


class Sampling(Section):
    max_tokens: PositiveInt
    """Longest completion."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0


class Server(Section):
    """One engine of a pool whose engines differ from each other, or that somebody else started."""

    url: str | None = None
    """An engine that runs already, here or on another host: `http://10.0.0.2:9000`. Absent: the run starts it."""
    devices: tuple[NonNegativeInt, ...] = ()
    """GPU indices, one a rank; ignored on a CPU."""
    tensor_parallel_size: PositiveInt = 1


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: tuple[NonNegativeInt, ...] = (0,)
    """GPU indices; ignored on a CPU. Each replica takes the next ones, one a rank, and where there are fewer, as many
    replicas share each GPU; with bridge.name = shared all run on the same."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks of a replica that share each layer: a GPU each, or processes on a CPU."""
    num_replicas: PositiveInt = 1
    """Engine processes that sample side by side, all on the same policy version."""
    servers: tuple[Server, ...] = ()
    """In place of `num_replicas`, `tensor_parallel_size` and `devices`, where the engines of the pool are not alike."""
    max_restarts: NonNegativeInt = 3
    """How often a run starts an engine again that died, while `bridge.min_engines` others live."""
    host: str = "127.0.0.1"
    port: Port = 0
    """0 leases free ports; otherwise replica i listens on port + i."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Of each GPU, for weights and KV cache together, by each engine. Ignored on a CPU. Several on one GPU start
    at once, cannot measure what is left, and cache in half of their share each; `extra.kv_cache_memory_bytes` says
    otherwise."""
    kv_cache_bytes: PositiveInt = 256 << 20
    """On a CPU only."""
    max_num_seqs: PositiveInt = 256
    """Sequences sampled at once; more of them wait. A step has groups_per_step × rollouts_per_group."""
    enforce_eager: bool | None = None
    """Absent: CUDA graphs on a GPU, eager on a CPU."""
    num_threads: NonNegativeInt = 0
    """CPU threads; 0 shares the machine's cores with the learner."""
    start_timeout_seconds: PositiveFloat = 300.0
    request_timeout_seconds: PositiveFloat = 300.0
    """A group must be sampled and scored within it; below trajectory.lease_seconds."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own options, passed through and checked by vLLM: `{max_num_batched_tokens: 8192}`."""

    @field_validator("extra")
    @classmethod
    def _counts(cls, extra: dict[str, Any]) -> dict[str, Any]:
        """Of vLLM's options those that are counted with here."""
        for option in ("pipeline_parallel_size", "max_loras"):
            if option in extra and not (type(extra[option]) is int and extra[option] > 0):
                raise ValueError(f"{option} = {extra[option]!r} must be a whole number above 0")
        return extra


class Overlong(Section):
    """Soft punishment of completions close to `sampling.max_tokens` (DAPO), added to the reward as part `overlong`."""

    cache_tokens: PositiveInt
    """Where it begins: so many tokens below the limit. From there it grows linearly."""
    penalty: PositiveFloat = 1.0
    """What is taken off at the limit."""


class Environment(Section):
    task: str
    """A built-in (`arithmetic`, `gsm8k`) or an import path: `my_package.my_module:MyEnvironment`."""
    name: str | None = None
    """Default: the task's. Must differ between environments of one run."""
    weight: PositiveFloat = 1.0
    """Share of the groups, relative to the other environments."""
    concurrency: PositiveInt = 64
    """Groups in flight at once."""
    overlong: Overlong | None = None
    """Absent: long completions are not punished. Held-out tasks never are."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the environment's constructor."""


class Trajectory(Section):
    host: str = "127.0.0.1"
    port: Port = 0
    lease_seconds: PositiveFloat = 600.0
    """How long a learner may hold groups, and an environment a permit, without a word."""
    wait_timeout_seconds: PositiveFloat = 600.0
    """How long the learner waits for a full batch before it names who did not deliver."""
    max_request_bytes: PositiveInt = 256 << 20
    """Of a request's body, unpacked."""
    max_store_bytes: PositiveInt = 64 << 30
    """Of the store on disk; groups beyond it are refused until the learner has consumed some."""


class SequenceMask(Section):
    """Leaves whole samples out, whatever their tokens weigh: with token weights, the "sequence mask, token TIS" of
    OpenRLHF and verl."""

    level: Literal["sequence", "geometric"] = "geometric"
    """What must lie in the band: the product of the sample's token ratios, or its geometric mean."""
    clip_min: Fraction = 0.0
    clip_max: Annotated[float, Field(ge=1)]


class Importance(Section):
    """Corrects for tokens that another policy drew than the one trained: the engine's rounding, or an older version."""

    level: Literal["none", "token", "sequence", "geometric"] = "token"
    """What the ratio learner / sampler is of: one token, the product over its sample, or that product's geometric mean,
    which suits long samples. `none` weighs every token 1."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Outside of the band a weight is cut to its border (TIS), or set to 0 (MIS)."""
    clip_min: Fraction = 0.0
    """Lower border of the band."""
    clip_max: Annotated[float, Field(ge=1)] = 2.0
    """Upper border; 1, the ratio of a token that is on-policy, is always inside."""
    sequence_mask: SequenceMask | None = None


class Loss(Section):
    name: Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo"] = "grpo"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """1: ratios have no lower bound, as in TRL's and ms-swift's `cispo`."""
    clip_high: PositiveFloat = 0.2
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the k3 estimate of KL(policy || reference). 0: no reference model is loaded."""
    kl_ratio: bool = False
    """Multiplies that estimate by the PPO ratio, so that its gradient, too, is one of KL(policy || reference), of older
    tokens as well (DeepSeek-V3.2; TRL's `use_bias_correction_kl`, which is on there). Alone, as in the GRPO paper, its
    gradient is one of KL(reference || policy)."""
    old_logprobs: Literal["learner", "sampler"] = "learner"
    """What the PPO ratio divides by: the learner's own at the start of the step, or the sampler's."""
    scale_advantages: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group's rewards, of the batch's, or not at all (Dr. GRPO)."""
    mask_truncated: bool = False
    """Leaves completions cut off by the length limit out of the loss."""
    importance: Importance = Importance()


class Optimizer(Section):
    learning_rate: PositiveFloat = 1e-6
    aligner_learning_rate: PositiveFloat | None = None
    """Of a vision-language model's aligner; it follows the same schedule, in proportion. Absent: learning_rate."""
    vision_learning_rate: PositiveFloat | None = None
    """Of its vision tower."""
    min_learning_rate: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; `cosine` and `linear` (TRL's) fall to min_learning_rate at the end of the run."""
    num_warmup_steps: NonNegativeInt = 0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    moments: Literal["float32", "int8"] = "float32"
    """Of AdamW: 8 bytes a parameter, or 2.03 to 2.5 and the package torchao: 256 to 16 elements of a row share a scale.
    Norms, biases and what the log names stay in float32."""
    in_backward: bool = False
    """Each parameter is stepped by the last micro-batch's backward pass as soon as its gradient is whole, and the
    gradient freed. With one micro-batch a step no two gradients ever exist at once."""


class Recomputation(Section):
    """Activations computed again in the backward pass instead of kept: less memory for more time."""

    what: Literal["none", "selective", "attention", "full"] = "none"
    """`selective`: of a layer, its matrix products and attention are kept, not its norms, rotations and activations:
    two thirds of the memory, no product twice. `attention`: its input and attention alone. `full`: only its input."""
    every: PositiveInt = 1
    """Of every how many layers one does so."""


class Learner(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: tuple[NonNegativeInt, ...] = (0,)
    """GPU indices, one a rank; ignored on a CPU."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that train one model together, each with its part of every layer: one a GPU, or processes on a CPU."""
    data_parallel_size: PositiveInt = 1
    """Ranks that see other tokens each, and keep a part of every parameter, gradient and moment (FSDP). As above; more
    than `devices` names when torchrun starts them on several hosts."""
    num_threads: NonNegativeInt = 0
    """CPU threads of all ranks together; 0 shares the machine's cores with the engine."""
    token_budget: PositiveInt = 8192
    """Tokens of a micro-batch; peak memory follows it, not the group."""
    logprob_chunk_tokens: PositiveInt = 1024
    """As many logits as this many rows have are alive at once."""
    attention: str = "auto"
    """`auto`: the first that works here of `flash3` and `flash4` (where these FlashAttentions are installed), `flash`
    (torch's own), and on a CPU SDPA. Or a name that transformers knows, such as `kernels-community/flash-attn3`.
    Several, with commas between: the first that works here, as the log says:
    `kernels-community/vllm-flash-attn3,auto`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch compiles the layers at the first step. auto: dense layers on GPUs, but not with
    tensor_parallel_size above 1, nor with run.deterministic."""
    recomputation: Recomputation = Recomputation()
    loss: Loss = Loss()
    gradients: Literal["float32", "bfloat16"] = "float32"
    """What the gradients of bfloat16 parameters add up in: 4 bytes a parameter, or 2 and a rounding a micro-batch."""
    optimizer: Optimizer = Optimizer()
    unrecorded: Literal["refuse", "accept"] = "refuse"
    """Samples whose sampler recorded no logprobs or policy versions, as environments of other frameworks send them:
    stop the run, or take them: the logprobs become the learner's own, and staleness is not bounded."""
    checkpoint_interval: PositiveInt = 10
    """Steps between checkpoints."""
    checkpoint_name: Annotated[str, Field(pattern=r"^[^{}]*\{step(:0\d+d)?\}$")] = "checkpoints/step-{step:06d}"
    """Folder of a step's checkpoint, in run.dir."""
    num_checkpoints: PositiveInt = 2
    """Checkpoints kept."""


class Bridge(Section):
    name: Literal["restart", "shared", "broadcast", "lora"] = "restart"
    """`shared`: one copy of the weights in the memory of one device; `broadcast`: full weights to engines on other
    GPUs; `lora`: the adapter alone, swapped while requests run; `restart`: checkpoints, works with everything. With
    `model.lora`, `shared` is one base and swapped adapters."""
    interval: PositiveInt = 1
    """Steps between publishes. Above 1 engines sample several steps from one version."""
    restart: Literal["in_place", "process"] = "in_place"
    """Reload the running engine's weights, or replace its process."""
    in_flight: Literal["drain", "keep", "abort"] = "drain"
    """What happens to running requests when the weights move: they end first, they freeze and go on under the new
    version (every token keeps the version it was sampled under), or they end at once as aborted. With
    `run.max_staleness` above 0 requests are always running: `keep` goes on with them, and groups that outlive more
    publishes than that are dropped, where `drain` waits for the longest. An adapter's requests `drain` without
    anybody waiting for them: they end under the adapter they began with."""
    frozen_kv: Literal["recompute", "reuse"] = "recompute"
    """With `in_flight: keep`, what becomes of a frozen request's keys and values. `recompute`: its context is computed
    again under the new weights, so that a token's logprob is exactly its version's (AReaL and verl's partial rollouts
    do so too). `reuse`: it goes on with those of the weights it began with and sees only the short pause (as in
    PipelineRL); its tokens carry their versions, but no one version's weights give their logprobs, which is what
    importance correction is for."""
    bucket_bytes: PositiveInt = 128 << 20
    """With `broadcast`: what one collective call carries. Learner and engine keep two such buffers each."""
    sparse: bool = False
    """With `broadcast`: only values whose bits changed are sent, where that is less than all. The learner keeps the
    bits last published, as many bytes as the model has (of several ranks the first)."""
    adapter_transfer: Literal["auto", "memory", "files"] = "auto"
    """How an adapter reaches an engine: memory on the learner's own host, files elsewhere."""
    timeout_seconds: PositiveFloat = 300.0
    host: str | None = None
    """This machine's address as engines on other hosts reach it, where a `broadcast` meets. Who reaches it may join:
    name one of a private network. Absent: engine.host."""
    min_engines: PositiveInt | None = None
    """Fewest engines that a publish must reach: with so many left the run goes on without those that died, and takes
    them back, proved, when they answer again. Absent: every one."""


class Parity(Section):
    """Learner and engine logprobs compared on fixed prompts; above a threshold the run stops."""

    interval: NonNegativeInt = 20
    """Steps between checks; 0 checks before the first step only."""
    prompts: tuple[str, ...] = ("The capital of France is", "def fibonacci(n):", "2 + 2 =", "Once upon a time")
    images: tuple[str, ...] = ()
    """Of a vision-language model: image files, each shown with the first prompt in the model's chat template."""
    max_tokens: PositiveInt = 32
    max_mean_abs_diff: PositiveFloat = 0.05
    max_k3_kl: PositiveFloat = 0.005


class Evaluation(Section):
    """Accuracy on the environments' held-out tasks, before and after training."""

    num_tasks: NonNegativeInt = 0
    """Per environment; 0: no evaluation."""
    num_samples: PositiveInt = 1
    """Attempts at each task, for pass@k and maj@k; more than one needs a temperature."""
    temperature: NonNegativeFloat = 0.0


class Observe(Section):
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go beside the run's own `metrics.jsonl`; each needs the package of its name. TensorBoard's files
    are in `<run.dir>/tensorboard`; wandb and trackio take their own environment variables (`WANDB_MODE=offline`)."""
    project: str = "syncline"
    """In wandb and trackio."""
    group: str | None = None
    """In wandb and trackio, of the starts of one run. Default: the name of the run's folder."""
    training_log: bool = False
    """`training.log` in run.dir: what the learner logs, the generation's settings, each step's metrics under TRL's
    names."""
    completions_csv: str | None = None
    """A file that gets a row for every completion trained on: step, prompt, completion, action, reward,
    target_action (where an environment has such parts) and all the reward's parts."""


class RunConfig(Section):
    run: Run
    model: Model
    sampling: Sampling
    environments: tuple[Environment, ...]
    """Empty: whoever comes to the trajectory server, be it `syncline env` (its weight is 1) or an environment of the
    Atropos wire."""
    engine: Engine = Engine()
    trajectory: Trajectory = Trajectory()
    learner: Learner = Learner()
    bridge: Bridge = Bridge()
    parity: Parity = Parity()
    evaluation: Evaluation = Evaluation()
    observe: Observe = Observe()
