"""Environments of the real `atroposlib`, unchanged, against our server and our engine: serve, process, evaluate.

And the engine's side of it alone: `/generate` in every framework's form and vLLM's own routes, held by our pause.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from atropos_servers import registration
from real_engine import make_tiny_model, run_values, running_engine
from trajectory_process import TrajectoryProcess
from transformers import AutoTokenizer

from syncline.protocols import Receipt
from syncline.trajectory.client import TrajectorySource
from syncline.types import Lack

pytestmark = pytest.mark.e2e
ENVIRONMENT = Path(__file__).parents[1] / "atropos_environment.py"
PROMPT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    model = make_tiny_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = PROMPT
    tokenizer.save_pretrained(model)
    with running_engine(run_values(model, folder / "run"), folder) as engine:
        yield SimpleNamespace(control=engine, url=engine.url, model=str(model), tokenizer=tokenizer)


def post(engine, path: str, **body):
    answer = httpx.post(engine.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def options(engine, *, server_type: str = "vllm") -> list[str]:
    """As the example trainer's own documents give them."""
    return [
        *("--openai.base_url", f"{engine.url}/v1", "--openai.model_name", engine.model, "--openai.api_key", "x"),
        *("--openai.server_type", server_type, "--env.tokenizer_name", engine.model, "--slurm", "False"),
        *("--env.use_wandb", "False"),
    ]


@contextmanager
def environment(verb: str, *arguments: str, folder: Path) -> Iterator[subprocess.Popen]:
    with (folder / f"{verb}.log").open("w") as log:
        argv = [sys.executable, str(ENVIRONMENT), verb, *arguments]
        process = subprocess.Popen(argv, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        print((folder / f"{verb}.log").read_text()[-3000:])


@pytest.fixture
def server(tmp_path):
    server = TrajectoryProcess(tmp_path / "run", groups_per_step=2)
    server.wait_until_ready()
    yield server
    server.kill()


@pytest.mark.parametrize("server_type", ["vllm", "sglang"])
def test_serve_feeds_a_trainer_of_the_same_wire(engine, server, tmp_path, server_type):
    with httpx.Client(base_url=server.url, timeout=30) as http:
        http.post("/register", json=registration(batch_size=4)).raise_for_status()
        with environment(
            "serve", *options(engine, server_type=server_type), "--env.rollout_server_url", server.url, folder=tmp_path
        ):
            batches = [wait_for_batch(http) for _ in range(3)]
    for group in (group for batch in batches for group in batch):
        for tokens, mask, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
            sampled = [label != -100 for label in mask]
            assert [label for label in mask if label != -100] == [t for t, s in zip(tokens, sampled, strict=True) if s]
            assert all(logprob <= 0 if s else logprob == 1.0 for logprob, s in zip(logprobs, sampled, strict=True))
            assert any(sampled)


def wait_for_batch(http: httpx.Client) -> list[dict]:
    for _ in range(600):
        if (batch := http.get("/batch").json()["batch"]) is not None:
            return batch
        threading.Event().wait(0.1)
    raise AssertionError(http.get("/status").text)


def test_serve_feeds_our_learner(engine, server, tmp_path):
    with TrajectorySource(server.url, wait_timeout_seconds=60) as source:
        source.start(policy_version=0, step=0)
        with environment("serve", *options(engine), "--env.rollout_server_url", server.url, folder=tmp_path):
            for step in (1, 2):
                groups = source.next_batch(2)
                source.acknowledge(groups, step=step, policy_version=step)
    for group in groups:
        assert (group.environment, len(group.rollouts)) == ("digits_0", 2)
        for rollout in group.rollouts:
            [sample] = rollout.samples
            assert sample.num_sampled > 0
            assert sample.lacks == (Lack.VERSIONS,)
            assert min(sample.logprobs) < 0


def test_process_writes_groups_and_evaluate_writes_metrics(engine, tmp_path):
    path, evals = tmp_path / "groups.jsonl", tmp_path / "evals"
    with environment(
        *("process", *options(engine), "--env.data_path_to_save_groups", str(path), "--env.total_steps", "2"),
        *("--env.group_size", "2"),
        folder=tmp_path,
    ) as process:
        assert process.wait(120) == 0
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(group["tokens"]) for group in groups] == [2, 2]
    with environment(
        "evaluate", *options(engine), "--env.data_dir_to_save_evals", str(evals), folder=tmp_path
    ) as process:
        assert process.wait(120) == 0
    assert "digits" in (evals / "metrics.json").read_text()


def test_generate_answers_in_the_form_it_was_asked(engine):
    ids = engine.tokenizer.encode("12+7=")
    answers = [
        post(engine, "/generate", prompt=prompt, n=2, max_tokens=4, logprobs=0, temperature=1.0)
        for prompt in ("12+7=", {"prompt_token_ids": ids})
    ]
    for answer in answers:
        assert answer["prompt_token_ids"] == ids
        assert [len(answer[name]) for name in ("text", "finish_reasons", "logprobs", "token_ids")] == [2, 2, 2, 2]
        for tokens, rows in zip(answer["token_ids"], answer["logprobs"], strict=True):
            assert [int(token) for [row] in rows for token in row] == tokens
    [row] = post(engine, "/generate", prompt="12+7=", max_tokens=1, prompt_logprobs=1)["prompt_logprobs"][1:2]
    assert str(ids[1]) in row
    theirs = post(engine, "/generate", input_ids=ids, sampling_params={"max_new_tokens": 3}, return_logprob=True)
    assert len(theirs["meta_info"]["output_token_logprobs"]) == theirs["meta_info"]["completion_tokens"] <= 3
    assert len(post(engine, "/generate/", prompts=["1+1="], n=2, max_tokens=3)["completion_ids"]) == 2
    lines = httpx.post(f"{engine.url}/generate", json={"prompt": "1+1=", "stream": True, "max_tokens": 4}).text
    assert json.loads(lines.splitlines()[-1])["text"][0].startswith("1+1=")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({}, "prompt must be a text"),
        ({"prompt": {"prompt_token_ids": []}}, "prompt must be a text"),
        ({"prompt": "1", "no_such": 1}, "no_such"),
        ({"prompt": "1", "temperature": "hot"}, "temperature"),
        ({"prompt": "1" * 500}, "maximum context length"),
    ],
)
def test_generate_says_what_is_wrong_with_a_request(engine, body, fault):
    answer = httpx.post(f"{engine.url}/generate", json=body, timeout=60)
    assert (answer.status_code, fault in answer.text) == (400, True), answer.text


def test_the_example_trainers_routes_tell_of_the_bridge_and_pause_by_hand(engine):
    def get(path: str) -> dict:
        return httpx.get(engine.url + path).json()

    info = get("/bridge/info")
    assert (info["model_name"], info["device"], info["shared_weights"], info["paused"]) == (
        engine.model,
        "cpu",
        False,
        False,
    )
    dtypes = get("/bridge/state_dict_info")
    assert dtypes["dtype"] == "float32" and "model.embed_tokens.weight" in dtypes["parameters"]
    assert {"/generate", "/lora/load", "/bridge/pause"} <= set(get("/bridge/list_endpoints")["endpoints"])
    assert get("/bridge/debug")["version"] == get("/health")["version"]
    assert post(engine, "/bridge/pause") == {"status": "paused"}
    assert get("/bridge/is_paused") == {"paused": True}
    asked = threading.Thread(target=post, args=(engine, "/generate"), kwargs=REQUESTS["/generate"], daemon=True)
    asked.start()
    asked.join(1.0)
    assert asked.is_alive()
    assert post(engine, "/bridge/resume") == {"status": "resumed"}
    asked.join(60)
    assert not asked.is_alive()
    for path in ("/bridge/sleep", "/bridge/wake_up"):
        assert "does not sleep" in httpx.post(engine.url + path).text
    assert get("/bridge/is_sleeping") == {"sleeping": False}


def test_a_bridges_pause_is_not_ended_by_hand(engine):
    held = engine.control.pause(mode="drain", timeout_seconds=30).receipt
    answer = httpx.post(f"{engine.url}/bridge/resume")
    assert answer.status_code == 409 and "a bridge has paused this engine" in answer.text
    engine.control.resume(held)
    assert httpx.get(f"{engine.url}/bridge/is_paused").json() == {"paused": False}


REQUESTS = {
    "/generate": {"prompt": "1+1=", "max_tokens": 3},
    "/v1/completions": {"prompt": "1+1=", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "1+1="}], "max_tokens": 3},
}


def test_a_pause_holds_for_every_route_that_samples(engine):
    answers: dict[str, dict] = {}

    def ask(path: str) -> None:
        answers[path] = post(engine, path, **REQUESTS[path])

    engine.control.pause(mode="drain", timeout_seconds=30)
    threads = [threading.Thread(target=ask, args=(path,), daemon=True) for path in REQUESTS]
    for thread in threads:
        thread.start()
    threads[0].join(1.0)
    assert answers == {}
    engine.control.adopt(Receipt(7, engine.control.receipt().digest), resume=True)
    for thread in threads:
        thread.join(60)
    assert set(answers) == set(REQUESTS)
    [[[version, start, end]]] = answers["/generate"]["policy_versions"]
    assert (version, start) == (7, 0) and end > 0
    assert httpx.get(f"{engine.url}/health").json()["policy_version"] == 7
    assert httpx.get(f"{engine.url}/v1/models").json()["data"][0]["id"]
    assert httpx.get(f"{engine.url}/health_generate", timeout=30).status_code == 200
