"""`process`, `view` and `evaluate` over HTTP, with an engine that answers as the real one and samples from a rule."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from syncline.cli import main
from syncline.trajectory.wire import decode_group, encode_group
from syncline.types import Message, Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

Capture = pytest.CaptureFixture[str]
CHARACTERS = "0123456789+-="


class Engine(ThreadingHTTPServer):
    """Adds two numbers; the last of several completions is wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.receipts = [{"policy_version": 3, "digest": "abc123", "pause": 1}]
        """The last one is answered from then on."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def generate(self, body: dict) -> dict:
        left, right = "".join(CHARACTERS[i] for i in body["prompt_token_ids"]).rstrip("=").split("+")
        last = body["num_completions"] - 1
        sums = [int(left) + int(right) + (0 < i == last) for i in range(last + 1)]
        ids = [[CHARACTERS.index(c) for c in str(value)] for value in sums]
        return {
            "completions": [
                {"token_ids": i, "logprobs": [-0.5] * len(i), "versions": [[3, 0, len(i)]], "finish_reason": "stop"}
                for i in ids
            ]
        }


class Answer(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        receipts = self.server.receipts
        is_receipt = self.path == "/syncline/receipt"
        self._answer(receipts.pop(0) if is_receipt and len(receipts) > 1 else receipts[0])

    def do_POST(self) -> None:
        self._answer(self.server.generate(json.loads(self.rfile.read(int(self.headers["content-length"])))))

    def _answer(self, body: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def config(tmp_path: Path) -> str:
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="="))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(tmp_path / "model")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path / 'run'}, num_steps: 1, groups_per_step: 2, rollouts_per_group: 4}}\n"
        f"model: {{path: {tmp_path / 'model'}, max_length: 64}}\nsampling: {{max_tokens: 8}}\n"
        "environments: [{task: arithmetic, name: sums}]\nevaluation: {num_tasks: 6}\n"
    )
    return str(file)


def test_process_writes_whole_groups_and_a_page(engine: Engine, config: str, tmp_path: Path, capsys: Capture):
    out = tmp_path / "out"
    assert main(["process", config, "--engine-url", engine.url, "--num-groups", "3", "--out", str(out)]) == 0
    groups = [decode_group(line.encode()) for line in (out / "groups.jsonl").read_text().splitlines()]
    assert sorted(group.task_index for group in groups) == [0, 1, 2]
    assert {tuple(r.reward for r in group.rollouts) for group in groups} == {(1.0, 1.0, 1.0, 0.0)}
    assert groups[0].rollouts[0].samples[0].versions[0].policy_version == 3
    page = (out / "groups.html").read_text()
    assert page.count("<details>") == 3 and "12 completed" in page and "0.75" in page
    assert "src=" not in page and "href=" not in page and "<script" not in page


def test_view_shows_the_first_groups_and_escapes(engine: Engine, config: str, tmp_path: Path, capsys: Capture):
    group = {"environment": "<b>evil</b>", "task_index": 0, "prompt": [], "rollouts": []}
    file = tmp_path / "rollouts.jsonl"
    file.write_text((json.dumps(group) + "\n") * 3)
    assert main(["view", str(file), "--limit", "2"]) == 0
    page = (tmp_path / "rollouts.html").read_text()
    assert page.count("<details>") == 2 and "3, the first 2 of them below" in page
    assert "<b>evil" not in page


def test_view_reads_texts_with_any_character_in_them(tmp_path: Path):
    sample = TrainingSample((1, 2), (False, True), (0.0, -1.0), (VersionSpan(0, 1, 2),))
    said = (Message("user", "next\u2028line"), Message("assistant", "x\x85y"))
    rollout = Rollout((sample,), 1.0, RolloutStatus.COMPLETED, messages=said)
    file = tmp_path / "groups.jsonl"
    file.write_bytes(encode_group(RolloutGroup("g", "e", 0, (rollout,))) + b"\n")
    assert main(["view", str(file)]) == 0
    assert "next\u2028line" in (tmp_path / "groups.html").read_text()


@pytest.mark.parametrize("line", ["no json", "[1]", "3", '{"group_id": "x"}'])
def test_view_names_the_line_that_is_no_group(tmp_path: Path, line: str, capsys: Capture):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    assert main(["view", str(tmp_path / "x.jsonl")]) == 2
    assert "x.jsonl:1: is no group" in capsys.readouterr().err


def test_process_refuses_an_environment_that_is_not_there(config: str, tmp_path: Path, capsys: Capture):
    assert main(["process", config, "--engine-url", "http://x", "--index", "1", "--out", str(tmp_path / "o")]) == 2
    assert "--index: 1, but" in capsys.readouterr().err
    none = ["process", config, "--engine-url", "http://x", "--num-groups", "0", "--out", str(tmp_path / "o")]
    assert main(none) == 2
    assert "--num-groups: 0 samples nothing" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_evaluation_is_filed_under_the_digest_of_what_was_evaluated(
    engine: Engine, config: str, tmp_path: Path, capsys: Capture
):
    out = tmp_path / "evaluations"
    out.mkdir()
    words = ["evaluation.num_samples=4", "evaluation.temperature=1"]
    assert main(["evaluate", config, *words, "--engine-url", engine.url, "--out", str(out)]) == 0
    found = json.loads((out / "abc123.json").read_text())
    assert found["model"] == {"path": str(tmp_path / "model"), "policy_version": 3, "digest": "abc123"}
    [one] = found["environments"]
    assert (found["accuracy"], one["num_scored"]) == (0.75, 24)
    assert {k: at["rate"] for k, at in one["pass_at"].items()} == {"1": 0.75, "2": 1.0, "4": 1.0}
    told = capsys.readouterr().out
    assert "held-out sums: pass@4 1.000 [0.610, 1.000] on 6 tasks" in told


@pytest.mark.parametrize("option", ["--adapter", "--baseline"])
def test_an_option_of_a_pipelines_evaluation_is_not_ignored(
    engine: Engine, config: str, tmp_path: Path, capsys: Capture, option: str
):
    words = ["evaluate", config, "--engine-url", engine.url, "--out", str(tmp_path / "out.json")]
    assert main([*words, option, "somewhere"]) == 2
    assert f"{option}: is of a pipeline's file alone" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_weights_that_move_under_an_evaluation_are_an_error(
    engine: Engine, config: str, tmp_path: Path, capsys: Capture
):
    engine.receipts.append({"policy_version": 4, "digest": "def456", "pause": 2})
    out = tmp_path / "evaluation.json"
    assert main(["evaluate", config, "--engine-url", engine.url, "--out", str(out)]) == 5
    assert "the weights moved under the evaluation" in capsys.readouterr().err
    assert not out.exists()
