"""What becomes of each key of an ms-swift GRPO file, as tables; `ms_swift.py` reads them."""

from typing import Any

SERVER_KEYS = (
    "vllm_tensor_parallel_size",
    "vllm_data_parallel_size",
    "vllm_max_model_len",
    "vllm_gpu_memory_utilization",
    "vllm_max_num_seqs",
    "vllm_enable_prefix_caching",
    "vllm_disable_custom_all_reduce",
    "vllm_enforce_eager",
    "vllm_limit_mm_per_prompt",
    "vllm_enable_lora",
    "vllm_max_lora_rank",
    "vllm_use_async_engine",
    "vllm_engine_kwargs",
    "vllm_mm_processor_cache_gb",
    "vllm_disable_cascade_attn",
    "vllm_quantization",
)
REQUIRED = SERVER_KEYS[:3]
WHOLE_NUMBERS = (*REQUIRED, "vllm_max_num_seqs")
ENGINE = {
    "vllm_tensor_parallel_size": "engine.tensor_parallel_size",
    "vllm_data_parallel_size": "engine.num_replicas",
    "vllm_max_model_len": "model.max_length",
    "vllm_gpu_memory_utilization": "engine.gpu_memory_utilization",
    "vllm_max_num_seqs": "engine.max_num_seqs",
    "vllm_enforce_eager": "engine.enforce_eager",
    "vllm_enable_prefix_caching": "engine.extra.enable_prefix_caching",
    "vllm_disable_custom_all_reduce": "engine.extra.disable_custom_all_reduce",
    "vllm_limit_mm_per_prompt": "engine.extra.limit_mm_per_prompt",
    "vllm_mm_processor_cache_gb": "engine.extra.mm_processor_cache_gb",
    "vllm_disable_cascade_attn": "engine.extra.disable_cascade_attn",
    "vllm_quantization": "engine.extra.quantization",
}
"""The engine's settings, under whichever section the mode has them."""
ENGINE_OPTIONS = {name.removeprefix("vllm_") for name in SERVER_KEYS}
WHOLE = ("training.lr_scheduler_kwargs", *(f"{s}.{n}" for s in ("rlhf", "custom.extra.rollout_server") for n in (
    "vllm_engine_kwargs", "vllm_limit_mm_per_prompt")))  # fmt: skip
"""Mappings that are values."""
NUMBERS = {
    *("global_max_length", "rlhf.max_completion_length", "rlhf.num_generations", "rlhf.max_resample_times"),
    *("training.max_steps", "training.num_train_epochs", "training.warmup_ratio", "training.warmup_steps"),
    *(f"{section}.vllm_max_lora_rank" for section in ("rlhf", "custom.extra.rollout_server")),
}
"""What is reckoned with before our schema sees it."""
PLAIN_LOSS = "grpo"
"""The loss that another key makes another of: with ratios of whole sequences it is GSPO."""
LORA = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
ATTENTION = {"flash_attention_2": "flash", "flash_attn": "flash", "flash_attention_3": "flash3"}
TRANSLATED = {
    "model.model": "model.path",
    "model.torch_dtype": "model.dtype",
    "training.output_dir": "run.dir",
    "training.seed": "run.seed",
    "training.learning_rate": "learner.optimizer.learning_rate",
    "training.warmup_steps": "learner.optimizer.num_warmup_steps",
    "training.weight_decay": "learner.optimizer.weight_decay",
    "training.max_grad_norm": "learner.optimizer.max_grad_norm",
    "training.adam_epsilon": "learner.optimizer.eps",
    "training.save_steps": "learner.checkpoint_interval",
    "training.save_total_limit": "learner.num_checkpoints",
    "rlhf.num_generations": "run.rollouts_per_group",
    "rlhf.max_completion_length": "sampling.max_tokens",
    "rlhf.temperature": "sampling.temperature",
    "rlhf.top_p": "sampling.top_p",
    "rlhf.beta": "learner.loss.kl_coef",
    "rlhf.overlong_filter": "learner.loss.mask_truncated",
    "rlhf.rollout_importance_sampling_threshold": "learner.loss.importance.clip_max",
    "rlhf.vllm_server_timeout": "engine.start_timeout_seconds",
}
_LEVEL, _MODE = "learner.loss.importance.level", "learner.loss.importance.mode"
CHOICES: dict[str, dict[Any, dict[str, Any]]] = {
    "rlhf.loss_type": {name: {"learner.loss.name": name} for name in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")},
    "rlhf.importance_sampling_level": {"token": {}, "sequence": {"learner.loss.name": "gspo"}},
    "rlhf.scale_rewards": {
        **{name: {"learner.loss.scale_advantages": name} for name in ("group", "batch", "none")},
        True: {"learner.loss.scale_advantages": "group"},
        False: {"learner.loss.scale_advantages": "none"},
    },
    "rlhf.rollout_importance_sampling_mode": {
        f"{level}_{mode}": {_LEVEL: level, _MODE: mode}
        for level in ("token", "sequence")
        for mode in ("truncate", "mask")
    },
    "training.lr_scheduler_type": {
        "cosine": {"learner.optimizer.schedule": "cosine"},
        "cosine_with_min_lr": {"learner.optimizer.schedule": "cosine"},
        "cosine_warmup_with_min_lr": {"learner.optimizer.schedule": "cosine"},
        "constant": {"learner.optimizer.schedule": "constant"},
        "constant_with_warmup": {"learner.optimizer.schedule": "constant"},
    },
}
"""Path → value → our fields."""
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "rlhf.rlhf_type": (("grpo",), "is another method"),
    "rlhf.repetition_penalty": ((1.0,), "changes the distribution that the learner scores"),
    "rlhf.num_iterations": ((1,), "steps on a batch more than once, which this learner does not"),
    "rlhf.advantage_estimator": (("grpo",), "is no estimator of this learner"),
    "rlhf.sleep_level": ((0,), "puts the engine to sleep, which no bridge here needs"),
    "rlhf.offload_model": ((False,), "moves weights to the host, which no bridge here needs"),
    "rlhf.offload_optimizer": ((False,), "moves the optimizer to the host, which is not done here"),
    "tuner.use_swift_lora": ((False,), "is another implementation of LoRA"),
    "tuner.freeze_llm": ((False,), "would train no part of the language model"),
    "tuner.modules_to_save": (([], None), "trains whole modules beside the adapter"),
    "tuner.lora_bias": (("none",), "trains biases beside the adapter"),
    "training.fp16": ((False,), "is a type that this learner does not train in"),
    "training.optimizer": (("adamw_torch", "multimodal"), "is no optimizer of this learner"),
}
"""Path → (what it may be, why nothing else)."""
REFUSED = {
    "inherit": "is no way to build on another file (extends is)",
    "template.system": "is no part of the rows; put it into their prompt",
    "rlhf.multi_turn_scheduler": "is a class of ms-swift; write an environment (docs/environments.md)",
    "rlhf.gym_env": "is an environment of ms-swift; write one (docs/environments.md)",
    "rlhf.use_gym_env": "is an environment of ms-swift; write one (docs/environments.md)",
    "rlhf.vllm_server_base_url": "is another address than vllm_server_host and vllm_server_port",
    "custom.fusion_config": "mixes data sets by a file of its own; write the rows out as one custom.train_jsonl",
    "custom.augmentation": "changes images, and no image is read",
    "custom.grpo.batch_plan.enabled": "is short for other keys; write those out",
    "custom.grpo.chord.enabled": "mixes fine-tuning into the loss, which is not done here",
    "prompts.profile": "builds prompts of a recipe of its own; put them into the rows",
}
"""Paths that would change what is trained; harmless only where they are off."""
NEEDLESS = {
    "training.run_name": "output_dir names the run",
    "training.logging_dir": "metrics are in output_dir",
    "training.logging_steps": "every step is logged",
    "training.logging_first_step": "every step is logged",
    "training.report_to": "metrics.jsonl and report.html are always written",
    "training.packing": "sequences always lie end to end",
    "training.save_safetensors": "checkpoints always are",
    "training.save_only_model": "a checkpoint always holds what a resume needs",
    "training.save_strategy": "a checkpoint is written every save_steps, and the newest are kept",
    "training.save_last_epoch": "the last step is always saved",
    "training.save_delay_steps": "checkpoints begin with the first",
    "training.metric_for_best_model": "the newest checkpoints are kept",
    "training.greater_is_better": "the newest checkpoints are kept",
    "training.eval_strategy": "held-out tasks are evaluated before and after",
    "training.eval_steps": "held-out tasks are evaluated before and after",
    "training.per_device_eval_batch_size": "engines batch by themselves",
    "training.add_version": "a folder with a run in it is refused, not numbered",
    "training.deepspeed": "the learner's ranks are learner.devices",
    "training.dataloader_num_workers": "environments are processes of their own",
    "model.model_type": "read from the model",
    "template.template": "the tokenizer's own",
    "template.truncation_strategy": "a prompt that does not fit is an error of its group, and counted",
    "template.max_pixels": "no image is read",
    "rlhf.truncation_strategy": "a prompt that does not fit is an error of its group, and counted",
    "rlhf.log_completions": "a few are always logged",
    "rlhf.vllm_server_pass_dataset": "rewards see every column of the row",
    "rlhf.move_model_batches": "weights move in buckets (bridge.bucket_bytes)",
    "custom.dump_conversation_path": "rollouts are in output_dir",
    "custom.val_sample_limit": "evaluation.num_tasks says how many",
}
"""Path → why it makes no difference here."""
NEEDLESS_SECTIONS = {
    "data.": "rows come from custom.train_jsonl, and there is no data loader",
    "deepspeed.": "the learner's ranks are learner.devices",
}
