"""Does coherence in the reward change what DPO learns? One set of samples, several ways to prefer, one held-out set.

    python benchmarks/coherence_ablation.py --out runs/ablation --seeds 0 1 2            # small, on a CPU, in minutes
    python benchmarks/coherence_ablation.py --file pipeline.yaml --out runs/ablation

Of each seed the base's attempts are collected once and scored in every way (`WAYS`); pairs, DPO and evaluation follow,
each a stage as in `syncline pipeline`, so a killed ablation goes on where it was. All are compared with `correctness`,
in which coherence has no part, question by question: means over seeds, 95 % intervals by bootstrap over questions.

`placebo` has the pairs of `v2`, but a coin says which of two right answers is the chosen one. `v11` gives the names of
its eleven arms to the samples in order, so ask for eleven. Without `--file` the model is one that adds four digits and
writes its steps down (`recipes/demo/base_model.py`), and the engine is `tests/batching_engine.py`, no vLLM.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count, groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import ablation_tables as tables
from ablation_tables import BASELINE, PLACEBO, Outcome, Read

from syncline.cli.assess import assess_stage
from syncline.cli.collect import collect_stage
from syncline.cli.dpo import dpo_stage
from syncline.cli.pairs import pairs_stage
from syncline.cli.policies import Policies
from syncline.config.load import validated
from syncline.config.offline import OfflineConfig, load_offline
from syncline.observe.files import read_lines, write_atomically
from syncline.offline.answers import number
from syncline.offline.arithmetic import counterfactual
from syncline.offline.arms import arms_of
from syncline.offline.assess import read_marks
from syncline.offline.coherence import BETA, Solution, score_coherence
from syncline.offline.collect import ROLLOUTS_FILE
from syncline.offline.engines import running_engines
from syncline.offline.marks import GREEDY, SAMPLED, Marked
from syncline.offline.pairs import HELDOUT_FILE, PAIRS_FILE
from syncline.offline.records import Trajectory, read_trajectories
from syncline.offline.regime_w import VERSIONS, Attempt, rewards
from syncline.offline.regime_w import metrics as regime_w_metrics
from syncline.offline.stage import Finished

ROOT = Path(__file__).resolve().parents[1]
Reward = Callable[[Sequence[Trajectory]], Sequence[float]]
"""Of a question's attempts."""


def correctness(own: Sequence[Trajectory]) -> Sequence[float]:
    return [float(one.correct) for one in own]


def v11(own: Sequence[Trajectory]) -> Sequence[float]:
    names = [arm.name for arm in arms_of("v11", prompt="{question}")]
    attempts = [Attempt.of(one.text, names[one.sample % len(names)]) for one in own]
    version = VERSIONS["v11"]
    return rewards(attempts, own[0].gold, version, regime_w_metrics(attempts, version))


def v2(own: Sequence[Trajectory]) -> Sequence[float]:
    return [one.reward for one in own]


def signal(name: str) -> Reward:
    """`v2` of one signal; where it cannot be told it is 0, as `v2` is without any."""
    return lambda own: [one.correct + BETA * (one.scores[name] or 0.0) for one in own]


WAYS: Mapping[str, Reward] = {
    BASELINE: correctness,
    "v11": v11,
    "v2": v2,
    PLACEBO: v2,
    **{name: signal(name) for name in ("agreement", "steps", "counterfactual")},
}


def main() -> int:
    args = parsed()
    with ExitStack() as stack:
        config, urls = prepared(args, stack)
        path = Path(config.model.path)
        policies = stack.enter_context(Policies(config, path, given=urls, start=running_engines))
        base = read(config, assess_stage(config, policies, None, version=0).folder)
        digest = policies.digest(None, version=0)
        seeded = [config.model_copy(update={"run": config.run.model_copy(update={"seed": s})}) for s in args.seeds]
        collected = [collect_stage(c, lambda: policies.serve(None, version=0)[0], model=digest) for c in seeded]
        versions = count(1)
        outcomes: list[Outcome] = []
        for own, rollouts in zip(seeded, collected, strict=True):
            reference: set[tuple[str, str]] = set()
            for way in args.ways:
                pairs = preferred(own, rollouts, way, model=digest)
                reference = reference or keys(pairs)
                heldout = pairs.with_name(HELDOUT_FILE)
                trained = dpo_stage(own, path, pairs, heldout=heldout, policy=digest)
                version = next(versions)
                evaluated = assess_stage(config, policies, trained.folder / "adapter", version=version)
                counts = differences(pairs, reference) | {"steps": trained.facts["num_steps"]}
                outcomes.append(Outcome(way, own.run.seed, counts, read(config, evaluated.folder)))
                print(f"seed {own.run.seed}, {way}: {counts}", flush=True)
    lines = [*tables.means(base, outcomes, args.ways), "", *tables.compared(outcomes, args.ways[1:], BASELINE)]
    if {"v2", PLACEBO} <= set(args.ways):
        lines += ["", *tables.compared(outcomes, ["v2"], PLACEBO)]
    print("\n".join(lines))
    write_atomically(args.out / "ablation.md", "\n".join(lines) + "\n")
    return 0


def preferred(config: OfflineConfig, rollouts: Finished, way: str, *, model: str) -> Path:
    """The pairs of one way to score the attempts of a collection."""
    folder = Path(config.run.dir) / "ways" / f"{rollouts.folder.name}-{way}"
    found = list(read_trajectories(rollouts.folder / ROLLOUTS_FILE, Trajectory))
    asked = [own for own in found if not own.is_twin]
    scored: list[str] = []
    for _, group in groupby(asked, key=lambda one: one.question_id):
        own = list(group)
        for one, reward in zip(own, WAYS[way](own), strict=True):
            scores = {**one.scores, "reward": float(reward)}
            scored.append(one.model_copy(update={"scores": scores}).model_dump_json() + "\n")
    write_atomically(folder / ROLLOUTS_FILE, "".join(scored))
    if way == BASELINE:
        config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"max_coherence_per_question": 0})})
    pairs = pairs_stage(config, folder / ROLLOUTS_FILE, model=model).folder / PAIRS_FILE
    if way != PLACEBO:
        return pairs
    for name in (PAIRS_FILE, HELDOUT_FILE):
        text = "".join(json.dumps(tossed(pair)) + "\n" for pair in read_lines(pairs.with_name(name)))
        write_atomically(folder / name, text)
    return folder / PAIRS_FILE


def tossed(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair of two right answers, turned round or not by a hash of it."""
    told = pair["provenance"]
    keyed = f"{told['chosen']['key']} {told['rejected']['key']} {told['model']}"
    if told["kind"] != "coherence" or hashlib.sha256(keyed.encode()).digest()[0] % 2:
        return pair
    turned = told | {"chosen": told["rejected"], "rejected": told["chosen"]}
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"], "provenance": turned}


def keys(pairs: Path) -> set[tuple[str, str]]:
    told = [pair["provenance"] for pair in read_lines(pairs)]
    return {(one["chosen"]["key"], one["rejected"]["key"]) for one in told}


def differences(pairs: Path, reference: set[tuple[str, str]]) -> dict[str, int]:
    """What these pairs have that the baseline's have not."""
    told = [pair["provenance"] for pair in read_lines(pairs)]
    right = [one for one in told if one["kind"] == "correctness"]
    chosen, rejected = ({pair[i] for pair in reference} for i in (0, 1))
    return {
        "right_over_wrong": len(right),
        "right_over_right": len(told) - len(right),
        "other_chosen": sum(one["chosen"]["key"] not in chosen for one in right),
        "other_rejected": sum(one["rejected"]["key"] not in rejected for one in right),
        "other_pairs": sum((one["chosen"]["key"], one["rejected"]["key"]) not in reference for one in right),
    }


def read(config: OfflineConfig, folder: Path) -> Read:
    """Of all sets of questions together."""
    marks = [mark for own in config.eval.sets for mark in read_marks(config.eval, folder, own, seed=config.run.seed)]
    samples: dict[str, list[Marked]] = defaultdict(list)
    for mark in marks:
        if mark.arm == SAMPLED:
            samples[mark.question_id].append(mark)
    scores = {key: coherence_of(own) for key, own in samples.items()}
    return Read(
        greedy={mark.question_id: float(mark.is_correct) for mark in marks if mark.arm == GREEDY},
        sampled={key: fmean(mark.is_correct for mark in own) for key, own in samples.items()},
        coherence={key: fmean(one["coherence"] or 0.0 for one in own) for key, own in scores.items()},
        steps={key: fmean(one["steps"] or 0.0 for one in own) for key, own in scores.items()},
        tokens={key: fmean(mark.num_tokens for mark in own) for key, own in samples.items()},
    )


def coherence_of(own: Sequence[Marked]) -> list[dict[str, float | None]]:
    """As a collection scores a question's attempts."""
    gold = number(own[0].gold)
    changed = None if gold is None else counterfactual(own[0].question, own[0].solution, gold)
    return score_coherence([Solution(one.text, one.answer, one.is_correct, False, None) for one in own], changed)


def prepared(args: argparse.Namespace, stack: ExitStack) -> tuple[OfflineConfig, tuple[str, ...]]:
    """The configuration, and the URLs of engines that run already."""
    if args.file:
        return load_offline(args.file, [f"run.dir={args.out}", *args.overrides]), tuple(args.engine_urls)
    sys.path[:0] = [str(ROOT / "recipes" / "demo"), str(ROOT / "tests")]
    from base_model import Recipe, build_base_model, steps, tasks_of
    from batching_engine import BatchingEngine  # pyright: ignore[reportMissingImports]
    from small_engine import small_engine  # pyright: ignore[reportMissingImports]

    recipe = Recipe(digits=1, terms=4, shows_steps=True, **SMALL_RECIPE)
    path = build_base_model(ROOT / "runs" / "base", recipe)
    for split, size in (("train", args.questions), ("heldout", args.heldout)):
        unique = {task.expression: task for task in islice(tasks_of(recipe, split=split), size)}
        rows = [
            {
                "question": f"{task.expression}=",
                "answer": " ".join(f"<<{s}>>" for s in steps(task)) + f" #### {task.answer}",
            }
            for task in unique.values()
        ]
        write_atomically(args.out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _, url = stack.enter_context(small_engine(path, BatchingEngine))
    return validated(OfflineConfig, small_values(args.out, path)), (url,)


SMALL_RECIPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "misprints": 0.1,
    "batch_size": 64,
    "num_steps": 80,
    "num_noisy_steps": 50,
}


def small_values(out: Path, model: Path) -> dict[str, Any]:
    asked = {"prompt": "{question}", "max_tokens": 30, "temperature": 1.0}
    return {
        "run": {"dir": str(out)},
        "model": {"path": str(model), "max_length": 64, "lora": {"rank": 16, "alpha": 32}},
        "bridge": {"name": "restart"},
        "collect": {**asked, "questions": {"path": str(out / "train.jsonl")}, "rephrase": False, "num_samples": 11},
        "pairs": {"strategy": "best_vs_worst", "max_per_question": 2, "max_coherence_per_question": 2},
        "dpo": {
            "learning_rate": 1.0e-3,
            "pairs_per_step": 32,
            "microbatch_pairs": 32,
            "num_epochs": 3,
            "guard": {"interval": 10, "max_drop": 2.0},
        },
        "eval": {**asked, "sets": [{"name": "sums", "path": str(out / "heldout.jsonl")}], "num_samples": 6},
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of --file")
    parser.add_argument("--file", help="a pipeline's; its collect.coherence is v2")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="correctness comes first")
    parser.add_argument("--questions", type=int, default=300, help="collected on, without --file")
    parser.add_argument("--heldout", type=int, default=500, help="evaluated on, those that are there twice left out")
    args = parser.parse_args()
    args.ways = [BASELINE, *(way for way in args.ways if way != BASELINE)]
    return args


if __name__ == "__main__":
    sys.exit(main())
