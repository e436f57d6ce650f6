"""What a group of the Atropos wire is as ours, and back; and every answer of that wire, field by field."""

import gzip
import json

import pytest
from atropos_servers import environment, our_server, registration, scored, their_server
from pydantic import ValidationError

from syncline.testing import make_group
from syncline.trajectory import wire
from syncline.trajectory.atropos_wire import Registration, ScoredData, from_group, to_group
from syncline.types import Lack, Message

OWN = Registration(**registration(batch_size=6, wandb_group="run", num_steps=9))


def group_of(**fields):
    return to_group(ScoredData(**scored(4, 2) | fields), group_id="g", environment="math_0", task_index=3)


def test_a_group_keeps_tokens_rewards_messages_and_logprobs():
    messages = [[{"role": "user", "content": "1+1"}, {"role": "tool", "content": None, "reward": 1}]] * 2
    group = group_of(messages=messages)
    assert (group.group_id, group.environment, group.task_index) == ("g", "math_0", 3)
    assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0]
    [sample] = group.rollouts[1].samples
    assert sample.token_ids == (1, 4, 8)
    assert sample.loss_mask == (False, True, True)
    assert sample.logprobs == (0.0, -0.5, -0.25)
    assert sample.lacks == (Lack.VERSIONS,)
    assert group.rollouts[0].messages == (Message("user", "1+1"), Message("tool", "None"))
    assert wire.decode_group(wire.encode_group(group)) == group


@pytest.mark.parametrize("logprobs", [None, [[1.0, -0.5, 1.0]] * 2])
def test_missing_or_impossible_logprobs_are_marked_not_invented(logprobs):
    [sample] = group_of(inference_logprobs=logprobs).rollouts[0].samples
    assert sample.lacks == (Lack.VERSIONS, Lack.LOGPROBS)
    assert sample.logprobs == (0.0, 0.0, 0.0)


def test_a_zeroed_advantage_counts_for_the_mean_alone_and_the_first_token_for_nothing():
    group = group_of(overrides=[{"set_advantage_to_zero": True}, {}], masks=[[1, 4, 7], [1, 4, 8]])
    assert [rollout.samples[0].loss_mask for rollout in group.rollouts] == [(False,) * 3, (False, True, True)]
    assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0]


def test_a_group_of_ours_reads_as_one_of_theirs_and_back():
    ours = make_group("math", 0, rewards=(1.0, None, 0.5))
    theirs = from_group(ours)
    assert theirs.masks == [[-100, 6, 7]] * 2
    assert theirs.inference_logprobs == [[1.0, -0.5, -0.25]] * 2
    back = to_group(theirs, group_id="g", environment="math", task_index=0)
    assert [rollout.reward for rollout in back.rollouts] == [1.0, 0.5]
    assert back.rollouts[0].samples[0].logprobs == ours.rollouts[0].samples[0].logprobs


def test_messages_need_role_and_content():
    with pytest.raises(ValidationError, match="'role' and 'content'"):
        ScoredData(**scored(0), messages=[[{"role": "user"}], []])


def conversation(server) -> list:
    """What both servers are asked, in an order in which theirs has no fault."""
    answers = [
        server.get(path).json() for path in ("/", "/info", "/wandb_info", "/status", "/batch", "/latest_example")
    ]
    answers.append(server.post("/register-env", environment()).json())
    server.register(batch_size=8)
    answers.append(server.post("/register-env", environment()).json())
    answers += [server.get(path).json() for path in ("/info", "/wandb_info", "/batch", "/status")]
    answers += [
        server.post("/register-env", environment(desired_name=name)).json() for name in ("math", "code", "math")
    ]
    answers += [server.status_env(0).json()]
    body = gzip.compress(json.dumps(scored(0, env_id=0)).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answers.append(server.http.post("/scored_data", content=body, headers=headers).json())
    answers += [server.post("/scored_data", scored(1, 1, env_id=0)).json() for _ in range(2)]
    answers += [server.post("/scored_data_list", [scored(2, env_id=1), scored(3, 1, env_id=2)]).json()]
    answers += [server.post("/scored_data_list", [scored(4, 1, env_id=2)]).json()]
    answers += [server.status_env(0).json(), server.status_env(1).json(), server.get("/status").json()]
    answers += [server.get("/latest_example").json(), server.get("/batch").json(), server.get("/status").json()]
    answers += [server.post("/disconnect-env", {"env_id": 1}).json(), server.status_env(0).json()]
    answers += [server.post("/disconnect-env", {"env_id": 7}).json()["status"], server.get("/reset_data").text]
    answers += [server.get(path).json() for path in ("/wandb_info", "/status")]
    return answers


def theirs_alone(theirs, ours):
    """`ours` without the keys that we add."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return {key: theirs_alone(theirs[key], value) for key, value in ours.items() if key in theirs}
    return ours


def test_every_answer_is_theirs(tmp_path):
    with their_server() as server:
        theirs = conversation(server)
    with our_server(tmp_path) as server:
        ours = conversation(server)
    assert len(theirs) == len(ours)
    for their_answer, our_answer in zip(theirs, ours, strict=True):
        assert theirs_alone(their_answer, our_answer) == their_answer


def test_environments_of_a_native_run_are_told_what_its_learner_wants(tmp_path):
    """They register once it has started; a trainer of theirs may not take its place; its groups are leased as ours."""
    with our_server(tmp_path, own=OWN) as server:
        assert server.post("/register-env", environment()).json() == {"status": "wait for trainer to start"}
        server.post("/start", {"learner": "L", "policy_version": 3, "step": 3})
        assert server.get("/info").json() == {"batch_size": 6, "max_token_len": 128}
        assert server.get("/wandb_info").json() == {"group": "run", "project": "project"}
        answer = server.post("/register-env", environment()).json()
        assert (answer["env_id"], answer["starting_step"], answer["num_steps"]) == (0, 3, 9)
        assert server.post("/register", registration()).status_code == 409
        assert server.get("/reset_data").status_code == 409
        assert server.get("/batch").json()["batch"] is None
        server.push(scored(1, 3, env_id=0), scored(2, 2, env_id=0))
        body = {"learner": "L", "lease_id": "1", "num_groups": 2, "timeout_seconds": 0.0}
        leased = wire.decode(wire.LeaseAnswer, server.post("/lease", body).content).groups
        assert [(group.environment, len(group.rollouts)) for group in leased] == [("math_0", 3), ("math_0", 2)]


def test_groups_of_our_own_environments_reach_a_trainer_of_theirs(tmp_path):
    with our_server(tmp_path, weights={"own": 1.0}) as server:
        server.start(batch_size=2)
        ask = {"environment": "own", "worker": "0", "num_permits": 1, "held": [], "timeout_seconds": 0.0}
        [permit] = server.post("/permits", ask).json()["permits"]
        body = wire.encode_group(make_group("own", permit["task_index"]))
        headers = {"Content-Type": "application/json"}
        server.http.post(f"/groups?permit_id={permit['permit_id']}", content=body, headers=headers)
        assert server.get("/batch").json()["batch"][0]["masks"] == [[-100, 6, 7]] * 2
