"""DPO by TRL's real trainer on a model of a few thousand parameters: resumed to the bit, stopped before it forgets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra `offline` is not installed")

import torch
from real_engine import make_tiny_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerState

from syncline.config.offline import Dpo, Guard
from syncline.config.schema import Lora, Model
from syncline.errors import ConfigError, TrainingError
from syncline.observe.files import read_lines
from syncline.offline import dpo, guard
from syncline.offline.dpo import Task, train_dpo
from syncline.offline.guard import LAST_GOOD, METRIC, Watch, newest_checkpoint
from syncline.offline.stage import Notes

POLICY = "d" * 64
SMALL = Dpo(
    learning_rate=2e-3,
    pairs_per_step=4,
    microbatch_pairs=2,
    checkpoint_interval=2,
    guard=Guard(interval=2, num_pairs=8, max_drop=5.0),
)


def pair(a: int, b: int, *, chosen: str | None = None, rejected: str | None = None) -> dict:
    said = {"chosen": chosen or str(a + b), "rejected": rejected or str(a + b + 1)}
    messages = {field: [{"role": "assistant", "content": text}] for field, text in said.items()}
    prompt = [{"role": "user", "content": f"{a}+{b}="}]
    return {"prompt": prompt, **messages, "provenance": {"model": POLICY}}


def write_pairs(path: Path, pairs: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    root = tmp_path_factory.mktemp("dpo")
    model = make_tiny_model(root / "model", hidden_size=64)
    pairs = write_pairs(root / "pairs.jsonl", [pair(a, b) for a in range(5, 10) for b in range(4)])
    lora = Lora(rank=4, target_modules=("q_proj", "v_proj"))
    return Task(Model(path=str(model), max_length=32, lora=lora), pairs, policy=POLICY)


def trained(task: Task, folder: Path, config: Dpo = SMALL) -> Notes:
    notes = Notes(folder)
    train_dpo(config, task, notes)
    return notes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(task, tmp_path / "whole")
    rows = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1][METRIC] > whole.facts["chosen_logprob_before"], "the chosen answers became likelier"

    measure = guard.mean_logprob
    calls = iter(range(10))

    def dies_at_step_4(model: object, pairs: object) -> float:
        if next(calls) == 2:  # after the start and step 2
            raise KeyboardInterrupt
        return measure(model, pairs)  # type: ignore[arg-type]

    monkeypatch.setattr(guard, "mean_logprob", dies_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        trained(task, tmp_path / "cut")
    half_written = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    half_written.mkdir()
    (half_written / "adapter_model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(guard, "mean_logprob", measure)

    resumed = trained(task, tmp_path / "cut")
    assert resumed.facts["resumed_at_step"] == 2
    assert (resumed.tokens, resumed.facts["num_steps"]) == (whole.tokens, 5)
    assert [row["step"] for row in read_lines(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert all(
        torch.equal(tensor, weights(tmp_path / "cut")[name]) for name, tensor in weights(tmp_path / "whole").items()
    )


def test_a_collapse_of_the_chosen_answers_stops_it_and_keeps_the_last_good_adapter(task: Task, tmp_path: Path) -> None:
    """What is chosen among the held-out pairs is what training makes unlikely."""
    sums = [(a, b) for a in range(5, 10) for b in range(4)]
    turned = [pair(a, b, chosen=str(a + b + 1), rejected=str(a + b)) for a, b in sums]
    heldout = write_pairs(tmp_path / "heldout.jsonl", turned)
    strict = Guard(interval=1, max_drop=0.02)
    config = SMALL.model_copy(update={"losses": {"sigmoid": 1.0}, "num_epochs": 10.0, "guard": strict})
    told = r"chosen answers collapsed: .* nats a token by step \d+.*the last good adapter is"
    with pytest.raises(TrainingError, match=told) as raised:
        trained(replace(task, heldout=heldout), tmp_path, config)
    assert raised.value.exit_code == 9
    assert (tmp_path / LAST_GOOD / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter").exists()


def test_a_later_round_begins_with_the_adapter_of_the_one_before_as_its_reference(task: Task, tmp_path: Path) -> None:
    trained(task, tmp_path / "first")
    later = replace(task, start=tmp_path / "first" / "adapter")
    notes = trained(later, tmp_path / "second")
    first = read_lines(tmp_path / "first" / "metrics.jsonl")
    second = read_lines(tmp_path / "second" / "metrics.jsonl")
    assert notes.facts["chosen_logprob_before"] == pytest.approx(first[-1][METRIC], abs=1e-5)
    assert second[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-6), "policy and reference are the same at first"


def test_one_gpu_of_several_is_trained_on(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer would spread each micro-batch over all that it sees, and steps would hold as many times the pairs."""
    monkeypatch.setattr(dpo, "learner_device", lambda asked: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    exact = replace(task, model=task.model.model_copy(update={"dtype": "float32"}))
    assert trained(exact, tmp_path).facts["num_steps"] == 5


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ([], r"pairs\.jsonl: holds no pair"),
        ([pair(1, 2) | {"chosen": "3"}], r"pairs\.jsonl:1: field 'chosen' is missing or no list of messages"),
        ([pair(1, 2), {**pair(1, 3), "choosen": 1, "chosen": []}], r"pairs\.jsonl:2: field 'chosen'.*'choosen'"),
        ([pair(1, 2, chosen=" ")], r"pairs\.jsonl:1: field 'chosen': is empty"),
        ([pair(1, 2, chosen="4")], r"pairs\.jsonl:1: chosen and rejected are the same"),
        ([pair(1, 2, chosen="3" * 40)], r"have 4\d tokens, above model\.max_length = 32"),
        ([pair(1, 2) | {"provenance": {"model": "e" * 64}}], r"'e{12}' sampled these answers, and 'd{12}'"),
        (
            [pair(1, 2) | {"provenance": {"model": POLICY, "chosen": {"token_ids": [5, 5]}}}],
            r"provenance\.chosen\.token_ids: are not the tokens of its text",
        ),
        ([pair(1, 2) | {"provenance": "gpt"}], r"pairs\.jsonl:1: field 'provenance': 'gpt' is not what"),
        ([pair(1, 2) | {"provenance": {"model": POLICY, "chosen": "x"}}], r"pairs\.jsonl:1: field 'provenance'"),
        (
            [pair(1, 2) | {"prompt": [{"role": "user", "content": ""}]}],
            r"pairs\.jsonl:1: field 'prompt': has no tokens",
        ),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_named(task: Task, tmp_path: Path, broken: list[dict], told: str) -> None:
    bad = replace(task, pairs=write_pairs(tmp_path / "pairs.jsonl", broken))
    with pytest.raises(ConfigError, match=told):
        trained(bad, tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


REFUSING = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
REFUSING += "{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chat_template": REFUSING}, r"pairs\.jsonl:1: .*chat template.*no system role"),
        ({"eos_token": None}, r"pairs\.jsonl:1: field 'chosen': .* no end token"),
    ],
)
def test_a_tokenizer_that_cannot_say_a_pair_is_named_with_it(
    task: Task, tmp_path: Path, change: dict, told: str
) -> None:
    """Of another tool's pairs: with a system prompt for a template that takes none, or without tokens of its own."""
    tokenizer = AutoTokenizer.from_pretrained(task.model.path)
    for name, value in change.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    said = pair(1, 2)
    said["prompt"] = [{"role": "system", "content": "s"}, *said["prompt"]]
    model = task.model.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(ConfigError, match=told):
        trained(replace(task, model=model, pairs=write_pairs(tmp_path / "pairs.jsonl", [said])), tmp_path)


def test_pairs_that_are_all_told_apart_are_no_fault(tmp_path: Path) -> None:
    """A hinge has no gradient beyond its margin. A first step without one has nothing that trains."""
    watch = Watch(Guard(), [], folder=tmp_path, resumed_step=0)
    logs = {"loss": 0.0, "grad_norm": 0.0, "num_tokens": 12.0}
    watch.on_log(None, TrainerState(global_step=2), None, logs=logs)
    with pytest.raises(TrainingError, match="the gradient is 0: nothing trains"):
        watch.on_log(None, TrainerState(global_step=1), None, logs=logs)
    watch.close()
