"""Collecting rollouts our way and the original's two ways, in one run: tokens per second and how busy the GPU is.

    python benchmarks/offline_collect.py --model SmolLM2-135M/ --data gsm8k_train.jsonl --out runs/collect
    python benchmarks/offline_collect.py --shape qwen2.5-0.5b --out runs/collect         # random weights, sums

`hf` is transformers' `generate`, one trajectory at a time; `question` asks an engine for one question's arms at once
and waits for the last of them, as one `llm.generate` call a question does; `all` is `syncline collect`: everything
queued on the engine, every completion fsynced with tokens and logprobs. The first two begin nothing new after
`--slow-seconds`, and `question` gets our engine, CUDA graphs included, which the original's eager engine had not. Same
prompts, same sampling, same limits. Starting engines and loading models is not counted.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from gpus import watched

from syncline.bench.shapes import SHAPES, make_model
from syncline.cli.collect import collect_stage, engines
from syncline.config.load import validated
from syncline.config.offline import OfflineConfig
from syncline.engines.pool import EnginePool
from syncline.envs.rendering import load_tokenizer, rendered
from syncline.launch.plan import Machine
from syncline.observe.files import write_atomically
from syncline.offline.questions import load_questions
from syncline.offline.work import WorkItem, Workload
from syncline.types import SamplingParams

TARGETS = {"hf": 20.0, "question": 5.0}
"""How many times as many tokens a second `all` is to have."""
TARGET_BUSY = 0.9


@dataclass(frozen=True, slots=True)
class Measured:
    way: str
    trajectories: int
    tokens: int
    seconds: float
    gpu_busy: float | None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main() -> int:
    args = parsed()
    if (args.out / "collect").exists():
        print(f"--out: {args.out / 'collect'} is there already; name another folder", file=sys.stderr)
        return 2
    if args.shape:
        args.model = str(make_model(args.shape, args.out / args.shape, max_length=args.max_length))
    config = configured(args)
    by_question = work(config)
    found = [with_hf(config, by_question, args.slow_seconds)] if args.slow_seconds else []
    with engines(config, []) as urls:
        if args.slow_seconds:
            found.append(asyncio.run(by_questions(config, urls, by_question, args.slow_seconds)))
        ours, slots_busy = collected(config, urls)
    found.append(ours)
    print("\n".join([*table(found), *verdicts(found)]))
    print(f"slots busy {slots_busy:.1%}, {config.engine.num_replicas} engines")
    write_atomically(args.out / "result.json", json.dumps([asdict(one) | {"rate": one.rate} for one in found]) + "\n")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="a folder or a hub name")
    model.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape, which seldom stop early")
    parser.add_argument("--data", help="JSON lines of question and answer; default: sums")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--slow-seconds", type=float, default=60, help="of `hf` and of `question`; 0: not at all")
    parser.add_argument("--version", choices=("v8", "v11", "v2"), default="v8")
    parser.add_argument("--prompt", help="of v2")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--replicas", type=int, default=1, help="GPUs")
    parser.add_argument("--engines-per-gpu", type=int, default=1, help="a small model leaves a GPU idle between steps")
    return parser.parse_args()


def configured(args: argparse.Namespace) -> OfflineConfig:
    questions = {"path": args.data} if args.data else {"made": {}}
    collect = {
        "questions": questions | {"num_questions": args.questions},
        "coherence": args.version,
        "max_tokens": args.max_tokens,
        "requests_per_engine": 2 * args.max_num_seqs,
    }
    values: dict[str, Any] = {
        "run": {"dir": str(args.out / "collect")},
        "model": {"path": args.model, "max_length": args.max_length, "lora": {}},
        "engine": {
            "num_replicas": args.replicas * args.engines_per_gpu,
            "devices": list(range(args.replicas)),
            "max_num_seqs": args.max_num_seqs,
            "gpu_memory_utilization": 0.8 / args.engines_per_gpu,
        },
        "bridge": {"name": "restart"},
        "collect": collect | ({"prompt": args.prompt} if args.prompt else {}),
        "eval": {"sets": [{"made": {}}], "max_tokens": args.max_tokens},
    }
    return validated(OfflineConfig, values)


def work(config: OfflineConfig) -> list[list[WorkItem]]:
    """By question."""
    loaded = load_questions(config.collect.questions, seed=config.run.seed, heldout=False)
    items = Workload(loaded.questions, config.collect, seed=config.run.seed).first()
    return [[item for item in items if item.question_id == one.question_id] for one in loaded.questions]


def with_hf(config: OfflineConfig, by_question: list[list[WorkItem]], limit_seconds: float) -> Measured:
    """The original's first script: one trajectory at a time, batch 1."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    model.to(device)
    tokenizer = load_tokenizer(config.model.path)

    def generate(item: WorkItem, max_tokens: int) -> int:
        torch.manual_seed(item.seed)
        ids = torch.tensor([rendered(tokenizer, item.prompt)], device=device)
        arm = item.arm
        sampled = {"do_sample": True, "temperature": arm.temperature, "top_p": arm.top_p, "top_k": 0}
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **sampled)
        return answer.shape[1] - ids.shape[1]

    generate(by_question[0][0], 4)
    items = iter([item for own in by_question for item in own])
    counts: list[int] = []
    with watched_gpu(config) as busy:
        started = time.monotonic()
        while time.monotonic() - started < limit_seconds and (item := next(items, None)):
            counts.append(generate(item, config.collect.max_tokens))
        seconds = time.monotonic() - started
    return Measured("hf", len(counts), sum(counts), seconds, mean(busy))


async def by_questions(
    config: OfflineConfig, urls: tuple[str, ...], by_question: list[list[WorkItem]], limit_seconds: float
) -> Measured:
    """The original's vLLM script: a question's arms together, the next when the last of them has ended."""
    tokenizer, max_tokens = load_tokenizer(config.model.path), config.collect.max_tokens
    timeout = config.engine.request_timeout_seconds
    async with EnginePool(urls, timeout_seconds=timeout, unpublished_version=0) as pool:

        async def sample(item: WorkItem, limit: int) -> int:
            arm = item.arm
            sampling = SamplingParams(limit, temperature=arm.temperature, top_p=arm.top_p, seed=item.seed)
            [completion] = await pool.generate(rendered(tokenizer, item.prompt), sampling)
            return len(completion.token_ids)

        await asyncio.gather(*(sample(item, 4) for item in by_question[0]))
        counts: list[int] = []
        with watched_gpu(config) as busy:
            started = time.monotonic()
            questions = iter(by_question)
            while time.monotonic() - started < limit_seconds and (own := next(questions, None)):
                counts += await asyncio.gather(*(sample(item, max_tokens) for item in own))
            seconds = time.monotonic() - started
    return Measured("question", len(counts), sum(counts), seconds, mean(busy))


def collected(config: OfflineConfig, urls: tuple[str, ...]) -> tuple[Measured, float]:
    """Ours, from the first request to the last completion on disk, and the share of the engines' slots in use."""
    facts = collect_stage(config, lambda: urls).facts
    ours = Measured("all", facts["sampled"], facts["tokens"], facts["seconds"], facts["gpu_busy"])
    return ours, facts["slots_busy"]


def watched_gpu(config: OfflineConfig) -> AbstractContextManager[list[float]]:
    """How busy the engines' GPUs are, in percent."""
    gpus = Machine.here().gpus
    return watched([gpus[i] for i in config.engine.devices] if gpus else [], "utilization.gpu")


def mean(percents: list[float]) -> float | None:
    return fmean(percents) / 100 if percents else None


def table(found: list[Measured]) -> list[str]:
    ours = found[-1]
    lines = [
        "| way | trajectories | tokens | seconds | tokens/s | GPU busy | all ÷ it |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        busy = "not known" if one.gpu_busy is None else f"{one.gpu_busy:.0%}"
        row = (one.way, one.trajectories, one.tokens, f"{one.seconds:.1f}", f"{one.rate:,.0f}", busy)
        lines.append("| " + " | ".join(map(str, row)) + f" | {ours.rate / one.rate:.1f} |")
    return lines


def verdicts(found: list[Measured]) -> Iterator[str]:
    """Each target, and whether it is met."""
    ours = found[-1]
    for one in found[:-1]:
        ratio, target = ours.rate / one.rate, TARGETS[one.way]
        yield f"all / {one.way}: {ratio:.1f} times, target {target:g}: {'met' if ratio >= target else 'missed'}"
    if ours.gpu_busy is not None:
        met = "met" if ours.gpu_busy >= TARGET_BUSY else "missed"
        yield f"GPU busy: {ours.gpu_busy:.1%}, target {TARGET_BUSY:.0%}: {met}"


if __name__ == "__main__":
    sys.exit(main())
