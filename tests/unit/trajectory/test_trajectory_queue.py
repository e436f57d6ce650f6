"""The queue's rules, one by one with numbers worked by hand, then all together under random use."""

import copy
import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from syncline.testing import make_group
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.queue import PutOutcome, Refused, TrajectoryQueue
from syncline.trajectory.shares import Ask
from syncline.trajectory.status import queue_status, why_no_permit, why_waiting
from syncline.trajectory.tickets import HOLDS_GROUP, LIVE, TicketState
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A queue with a clock, and the short words the tests speak in."""

    def __init__(self, *, groups_per_step=2, max_staleness=0, weights=None, **limits) -> None:
        self.clock = Clock()
        self.limits = QueueLimits(groups_per_step, 2, max_staleness, lease_seconds=100.0, **limits)
        self.weights = weights or {"math": 1.0}
        self.ids = itertools.count(1)
        self.queue = TrajectoryQueue(self.limits, self.weights, clock=self.clock, new_id=lambda: f"p{next(self.ids)}")
        self.holding: dict[str, set[str]] = {}

    def start(self, *, policy_version=0, step=0, learner="L", resumed_version=None) -> None:
        self.queue.start(learner=learner, policy_version=policy_version, step=step, resumed_version=resumed_version)

    def ask(self, environment="math", num_permits=1, num_tasks=None) -> Ask:
        ask = Ask(environment, "0", num_permits, num_tasks)
        self.queue.ask(ask, held={ticket.permit_id for ticket in self.queue.ledger.live.values()})
        return ask

    def grant(self, environment="math", num_permits=1):
        ask = self.ask(environment, num_permits)
        granted = self.queue.grant(ask)
        self.queue.withdraw(ask)
        return granted

    def put(self, ticket, **group) -> PutOutcome:
        group.setdefault("group_id", f"g-{ticket.permit_id}")
        return self.queue.put(make_group(ticket.environment, ticket.task_index, **group), ticket.permit_id)

    def lease(self, num_groups=2, *, lease_id="lease", learner="L"):
        return self.queue.lease(num_groups, learner=learner, lease_id=lease_id)

    def acknowledge(self, tickets, *, step, policy_version=None, learner="L") -> None:
        version = step if policy_version is None else policy_version
        ids = [ticket.group_id for ticket in tickets]
        self.queue.acknowledge(ids, learner=learner, step=step, policy_version=version)

    def train(self, *, step) -> list[int]:
        """One whole on-policy step; the task indices it trained on."""
        for ticket in self.grant(num_permits=2):
            self.put(ticket, policy_version=step - 1)
        tickets = self.lease(lease_id=f"lease-{step}")
        self.acknowledge(tickets, step=step)
        return [ticket.task_index for ticket in tickets]

    @property
    def counters(self):
        return self.queue.state.counters


def indices(tickets) -> list[int]:
    return [ticket.task_index for ticket in tickets]


# A pass over the tasks


def test_tasks_that_are_done_with_are_counted_and_taken_back_with_the_steps_that_a_learner_lost():
    bench = Bench(max_refills=1)
    done = lambda: queue_status(bench.queue).environments["math"].num_done  # noqa: E731
    bench.start()
    bench.ask(num_tasks=8)
    assert (queue_status(bench.queue).environments["math"].num_tasks, done()) == (8, 0)
    assert bench.train(step=1) == [0, 1] and done() == 2
    bench.queue.commit(learner="L", step=1)
    bench.put(bench.grant()[0], rewards=(1.0, 1.0), policy_version=1)
    assert done() == 3, "replaced: sampled, scored and not handed out again"
    assert bench.train(step=2) == [3, 4] and done() == 5
    out = bench.grant(num_permits=2)
    bench.queue.give_back(out[0].permit_id, "sandbox down")
    assert done() == 5, "neither what is out nor what is to be handed out again"
    bench.start(policy_version=1, step=1, learner="M")
    assert done() == 3, "the checkpoint holds step 1"


# Permits


def test_no_permit_before_a_learner_has_started():
    bench = Bench()
    assert bench.grant() == []
    assert why_no_permit(bench.queue) == "no learner has been heard since the server began"
    bench.start()
    assert indices(bench.grant(num_permits=2)) == [0, 1]


def test_a_restarted_server_grants_nothing_until_it_has_heard_the_learner():
    bench = Bench()
    bench.start(policy_version=3, step=3)
    bench.queue = TrajectoryQueue(
        bench.limits, bench.weights, clock=bench.clock, new_id=lambda: "p", state=bench.queue.state
    )
    assert bench.grant() == [], "nobody knows yet what the engine serves"
    bench.queue.commit(learner="L", step=3)
    assert indices(bench.grant()) == [0]


def test_on_policy_permits_appear_only_with_the_acknowledged_version():
    bench = Bench(groups_per_step=2, max_staleness=0)
    bench.start()
    granted = bench.grant(num_permits=5)
    assert indices(granted) == [0, 1]
    for ticket in granted:
        bench.put(ticket)
    assert bench.grant() == []
    leased = bench.lease()
    assert bench.grant() == []
    bench.acknowledge(leased, step=1)
    assert indices(bench.grant(num_permits=5)) == [2, 3]


def test_capacity_is_one_batch_per_version_of_staleness_more():
    bench = Bench(groups_per_step=2, max_staleness=2)
    bench.start()
    assert indices(bench.grant(num_permits=100)) == [0, 1, 2, 3, 4, 5]
    assert "capacity of 6 groups is taken or promised: 6 permits out" in why_no_permit(bench.queue)


def test_an_index_given_back_goes_out_again_lowest_first():
    bench = Bench(groups_per_step=4)
    bench.start()
    tickets = bench.grant(num_permits=4)
    bench.queue.give_back(tickets[2].permit_id, "")
    bench.queue.give_back(tickets[1].permit_id, "sandbox down")
    bench.queue.give_back(tickets[1].permit_id, "sandbox down")
    assert indices(bench.grant(num_permits=4)) == [1, 2]
    assert bench.counters.returned == 2


def test_a_task_failing_too_often_is_abandoned_but_an_unused_permit_never_counts():
    bench = Bench(groups_per_step=1, max_faults=3)
    bench.start()
    for _ in range(10):
        bench.queue.give_back(bench.grant()[0].permit_id, "")
    for _ in range(2):
        bench.queue.give_back(bench.grant()[0].permit_id, "crashed")
    for _ in range(2):
        [ticket] = bench.grant()
        assert ticket.task_index == 0
        assert bench.put(ticket, rewards=(None, None)) is PutOutcome.FAILED
    assert indices(bench.grant()) == [1]
    assert (bench.counters.abandoned, bench.counters.failed) == (1, 2)


def test_an_overdue_permit_expires_and_its_late_group_is_not_taken():
    bench = Bench(groups_per_step=1)
    bench.start()
    [late] = bench.grant()
    bench.clock.now += 100.0
    [again] = bench.grant()
    assert (late.task_index, again.task_index) == (0, 0)
    assert [bench.put(late), bench.put(late)] == [PutOutcome.EXPIRED] * 2
    assert bench.put(again) is PutOutcome.ACCEPTED
    assert bench.counters.accepted == 1
    assert bench.counters.expired_permits == 1


def test_a_worker_that_does_not_hold_its_permits_gets_them_taken_back():
    bench = Bench(groups_per_step=2)
    bench.start()
    lost, kept = bench.grant(num_permits=2)
    successor = Ask("math", "0", 2)
    bench.queue.ask(successor, held=[kept.permit_id])
    assert indices(bench.queue.grant(successor)) == [lost.task_index]
    other_worker = Ask("math", "1", 2)
    bench.queue.ask(other_worker, held=[])
    assert bench.queue.ledger.count(TicketState.PERMITTED) == 2


def test_an_unknown_environment_is_refused_by_name():
    bench = Bench(weights={"math": 1.0, "code": 1.0})
    with pytest.raises(Refused, match=r"'maths' is not part of this run; known: \['code', 'math'\]"):
        bench.ask("maths")


# Fairness


def test_permits_follow_the_weights_when_all_ask():
    bench = Bench(groups_per_step=8, weights={"a": 3.0, "b": 1.0})
    bench.start()
    asks = [bench.ask("a", 100), bench.ask("b", 100)]
    assert [len(bench.queue.grant(ask)) for ask in asks] == [6, 2]
    assert bench.queue.asks == {}


def test_the_share_of_a_waiting_environment_is_kept_for_it():
    bench = Bench(groups_per_step=4, weights={"a": 1.0, "b": 1.0})
    bench.start()
    waiting = bench.ask("b", 100)
    assert len(bench.grant("a", 100)) == 2
    assert bench.grant("a", 100) == []
    assert len(bench.queue.grant(waiting)) == 2


def test_a_silent_environment_blocks_nobody_and_a_vanished_one_only_until_its_ask_is_withdrawn():
    bench = Bench(groups_per_step=4, weights={"a": 1.0, "b": 1.0, "silent": 9.0})
    bench.start()
    vanished = bench.ask("b", 100)
    assert len(bench.grant("a", 100)) == 2
    assert bench.grant("a", 100) == []
    bench.queue.withdraw(vanished)
    assert len(bench.grant("a", 100)) == 2


def test_credit_of_an_absent_environment_is_capped_at_one_capacity():
    bench = Bench(groups_per_step=4, weights={"a": 1.0, "b": 1.0})
    bench.start()
    for _ in range(50):
        for ticket in bench.grant("a", 4):
            bench.queue.give_back(ticket.permit_id, "")
    order = []
    for _ in range(4):
        asks = [bench.ask(name, 100) for name in "ab"]
        granted = [bench.queue.grant(ask) for ask in asks]
        order.append(tuple(len(tickets) for tickets in granted))
        for ticket in granted[0] + granted[1]:
            bench.queue.give_back(ticket.permit_id, "")
    assert order == [(0, 4), (2, 2), (2, 2), (2, 2)]


# Groups


def test_putting_the_same_group_twice_stores_one():
    bench = Bench()
    bench.start()
    [ticket] = bench.grant()
    assert [bench.put(ticket), bench.put(ticket)] == [PutOutcome.ACCEPTED] * 2
    assert (bench.counters.accepted, bench.queue.ledger.count(TicketState.QUEUED)) == (1, 1)
    with pytest.raises(Refused, match="is used up: group 'g-p1' was put under it"):
        bench.put(ticket, group_id="another")
    with pytest.raises(Refused, match="cannot be given back"):
        bench.queue.give_back(ticket.permit_id, "")


def test_a_repeated_put_is_recognized_after_the_group_was_trained_on():
    bench = Bench(groups_per_step=1)
    bench.start()
    [ticket] = bench.grant()
    bench.put(ticket)
    bench.acknowledge(bench.lease(1), step=1)
    bench.queue.commit(learner="L", step=1)
    assert bench.put(ticket) is PutOutcome.ACCEPTED
    assert bench.counters.accepted == bench.counters.trained == 1
    assert bench.queue.ledger.live == {}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (make_group("code", 0), "permit 'p1' is for task 0 of 'math', but the group holds task 0 of 'code'"),
        (make_group("math", 1), "permit 'p1' is for task 0 of 'math', but the group holds task 1 of 'math'"),
        (make_group("math", 0, rewards=(1.0,)), "has 1 rollouts; run.rollouts_per_group is 2"),
        (make_group("math", 0, policy_version=1), "tokens of policy version 1, but 0 is served"),
        (make_group("math", 0, group_id="x" * 257), "has more than 256 characters; no learner names it"),
        (make_group("math", 0, group_id="taken"), "group_id 'taken' is taken by another group"),
    ],
)
def test_a_group_that_contradicts_its_permit_is_refused(group, message):
    bench = Bench(weights={"math": 1.0, "code": 1.0})
    bench.start()
    ticket, other = bench.grant(num_permits=2)
    bench.put(other, group_id="taken")
    with pytest.raises(Refused, match=message):
        bench.queue.put(group, ticket.permit_id)
    assert ticket.state is TicketState.PERMITTED


def test_a_scored_rollout_without_versions_is_refused():
    bench = Bench()
    bench.start()
    [ticket] = bench.grant()
    unsampled = TrainingSample((1, 2), (False, False), (0.0, 0.0), ())
    good = make_group("math", 0).rollouts[0]
    bad = Rollout((unsampled,), 1.0, RolloutStatus.COMPLETED)
    with pytest.raises(Refused, match=r"rollouts.1 is completed but no token in it carries a policy version"):
        bench.queue.put(RolloutGroup("g", "math", 0, (good, bad)), ticket.permit_id)


def test_an_unknown_permit_is_refused_by_name():
    with pytest.raises(Refused, match="permit 'nope' is unknown"):
        Bench().queue.put(make_group("math", 0), "nope")


def test_a_partly_failed_group_is_queued():
    bench = Bench(groups_per_step=1)
    bench.start()
    assert bench.put(bench.grant()[0], rewards=(1.0, None)) is PutOutcome.ACCEPTED
    assert len(bench.lease(1)) == 1


def test_the_version_of_the_step_in_progress_is_accepted_but_leased_only_once_announced():
    """The engine serves it from `publish` on, a moment before the learner's acknowledgement arrives."""
    bench = Bench(groups_per_step=1, max_staleness=2)
    bench.start()
    first, second, third = bench.grant(num_permits=3)
    with pytest.raises(Refused):
        bench.put(second, policy_version=1)
    bench.put(first, policy_version=0)
    leased = bench.lease(1)
    assert bench.put(second, policy_version=1) is PutOutcome.ACCEPTED
    with pytest.raises(Refused, match="policy version 2, but 0 is served"):
        bench.put(third, policy_version=2)
    assert bench.lease(1, lease_id="other") == []
    bench.acknowledge(leased, step=1)
    assert bench.lease(1, lease_id="other") == [second]


# Dynamic sampling

UNIFORM, MIXED = (1.0, 1.0), (1.0, 0.0)


def test_groups_of_equal_rewards_are_replaced_by_fresh_tasks_until_the_refills_are_used_up():
    bench = Bench(groups_per_step=2, max_refills=2)
    bench.start()
    easy, mixed = bench.grant(num_permits=9)
    assert bench.put(mixed, rewards=MIXED) is PutOutcome.ACCEPTED
    outcomes = []
    for _ in range(3):
        outcomes.append(bench.put(easy, rewards=UNIFORM))
        [easy] = bench.grant(num_permits=9) or [easy]
    assert outcomes == [PutOutcome.REPLACED, PutOutcome.REPLACED, PutOutcome.UNREPLACED]
    assert indices(bench.lease()) == [1, 3], "the third easy task is trained on, so that the step has an end"
    assert (bench.counters.replaced, bench.counters.unreplaced, bench.counters.abandoned) == (2, 1, 0)
    assert bench.counters.granted == bench.counters.accepted + bench.counters.replaced


def test_every_step_has_its_own_refills_and_says_once_that_they_are_used_up():
    bench = Bench(groups_per_step=2, max_refills=1)
    bench.start()
    for step in (1, 2):
        outcomes = []
        while granted := bench.grant(num_permits=9):
            outcomes += [bench.put(ticket, rewards=UNIFORM, policy_version=step - 1) for ticket in granted]
        assert outcomes == [PutOutcome.REPLACED, PutOutcome.UNREPLACED, PutOutcome.ACCEPTED]
        bench.acknowledge(bench.lease(lease_id=f"{step}"), step=step)
    assert (bench.counters.replaced, bench.counters.unreplaced) == (2, 4)


def test_a_replaced_group_put_again_changes_nothing():
    bench = Bench(groups_per_step=1, max_refills=3)
    bench.start()
    [ticket] = bench.grant()
    assert [bench.put(ticket, rewards=UNIFORM) for _ in range(2)] == [PutOutcome.REPLACED] * 2
    assert bench.counters.replaced == 1


@pytest.mark.parametrize(
    ("rewards", "outcome"),
    [((None, 1.0), PutOutcome.REPLACED), ((None, None), PutOutcome.FAILED), ((0.1, 0.2), PutOutcome.ACCEPTED)],
)
def test_a_lone_reward_has_no_sibling_to_differ_from_and_a_failure_stays_one(rewards, outcome):
    bench = Bench(groups_per_step=1, max_refills=1)
    bench.start()
    [ticket] = bench.grant()
    assert bench.put(ticket, rewards=rewards) is outcome


def test_a_group_without_a_permit_is_replaced_as_one_with_a_permit_is():
    bench = Bench(groups_per_step=2, max_refills=1)
    bench.start()
    outcomes = [bench.queue.admit(bench.ask(), rewards=rewards, digest="") for rewards in (UNIFORM, MIXED, UNIFORM)]
    assert [found and found[1] for found in outcomes] == [
        PutOutcome.REPLACED,
        PutOutcome.ACCEPTED,
        PutOutcome.UNREPLACED,
    ]
    assert bench.queue.admit(bench.ask(), rewards=MIXED, digest="") is None, "the step's groups are there"
    assert indices(bench.lease()) == [1, 2]


def test_an_environment_nobody_named_takes_part_where_the_run_admits_it():
    closed, opened = Bench(), Bench(groups_per_step=4, admits_environments=True)
    with pytest.raises(Refused, match="'code' is not part of this run"):
        closed.grant("code")
    opened.start()
    assert [len(opened.grant(name, num_permits=2)) for name in ("code", "math")] == [2, 2]
    opened.start()
    assert opened.queue.ledger.weights == {"math": 1.0, "code": 1.0}


def test_without_refills_equal_rewards_are_accepted_as_they_come():
    bench = Bench(groups_per_step=1)
    bench.start()
    [ticket] = bench.grant()
    assert bench.put(ticket, rewards=UNIFORM) is PutOutcome.ACCEPTED
    assert bench.counters.unreplaced == 0


# Leases


def test_a_lease_takes_the_oldest_first_and_a_whole_batch_or_nothing():
    bench = Bench(groups_per_step=2, max_staleness=1)
    bench.start()
    tickets = bench.grant(num_permits=3)
    bench.put(tickets[2])
    assert bench.lease(2) == []
    bench.put(tickets[0])
    bench.put(tickets[1])
    assert indices(bench.lease(2)) == [2, 0]


def test_asking_for_the_same_lease_again_leases_nothing_more():
    bench = Bench(groups_per_step=1, max_staleness=1)
    bench.start()
    for ticket in bench.grant(num_permits=2):
        bench.put(ticket)
    assert bench.lease(1, lease_id="x") == bench.lease(1, lease_id="x")
    assert bench.queue.ledger.count(TicketState.LEASED) == 1


def test_a_batch_that_could_never_be_formed_is_refused():
    bench = Bench(groups_per_step=2)
    bench.start()
    with pytest.raises(Refused, match="num_groups 3 can never be queued at once: capacity is 2"):
        bench.lease(3)


def test_a_group_that_took_long_is_leased_before_later_ones_while_it_is_not_too_old():
    bench = Bench(groups_per_step=2, max_staleness=1)
    bench.start()
    slow, *quick = bench.grant(num_permits=4)
    for ticket in quick[:2]:
        bench.put(ticket)
    bench.acknowledge(bench.lease(2), step=1)
    quick += bench.grant(num_permits=9)
    for ticket in quick[2:]:
        bench.put(ticket, policy_version=1)
    bench.put(slow, policy_version=0)
    assert indices(bench.queue.ready())[0] == slow.task_index
    assert indices(bench.lease(2, lease_id="second")) == [slow.task_index, quick[2].task_index]
    assert bench.counters.stale == 0


def test_stale_groups_are_dropped_and_their_tasks_go_out_again():
    bench = Bench(groups_per_step=1, max_staleness=1)
    bench.start()
    quick, slow = bench.grant(num_permits=2)
    bench.put(quick)
    bench.acknowledge(bench.lease(1, lease_id="1"), step=1)
    [quick] = bench.grant()
    bench.put(quick, policy_version=1)
    bench.acknowledge(bench.lease(1, lease_id="2"), step=2)
    bench.put(slow, policy_version=0)
    assert bench.lease(1, lease_id="3") == []
    assert bench.counters.stale == 1
    assert indices(bench.grant()) == [slow.task_index]


def test_age_counts_from_the_served_version():
    """Served 1, trained into 2: a group of version 0 is one version behind, as `max_staleness` 1 allows."""
    bench = Bench(groups_per_step=1, max_staleness=1)
    bench.start()
    first, second = bench.grant(num_permits=2)
    bench.put(first)
    bench.put(second)
    bench.acknowledge(bench.lease(1, lease_id="1"), step=1)
    assert bench.lease(1, lease_id="2") == [second]


def test_an_expired_lease_returns_to_its_place_and_can_still_be_acknowledged():
    bench = Bench(groups_per_step=1, max_staleness=1)
    bench.start()
    first, second = bench.grant(num_permits=2)
    bench.put(first)
    bench.put(second)
    leased = bench.lease(1, lease_id="1")
    bench.clock.now += 100.0
    assert bench.lease(1, lease_id="2") == [first]
    assert bench.counters.expired_leases == 1
    bench.clock.now += 100.0
    bench.acknowledge(leased, step=1)
    assert bench.lease(1, lease_id="3") == [second]


def test_acknowledging_is_repeatable_and_refuses_what_was_trained_on_before():
    bench = Bench()
    bench.start()
    for ticket in bench.grant(num_permits=2):
        bench.put(ticket)
    leased = bench.lease()
    bench.acknowledge(leased, step=1)
    bench.acknowledge(leased, step=1)
    with pytest.raises(Refused, match="trained on in an earlier step"):
        bench.acknowledge(leased, step=2)
    bench.queue.commit(learner="L", step=1)
    with pytest.raises(Refused, match="not held for the learner"):
        bench.acknowledge(leased, step=2)


def test_steps_and_versions_only_grow():
    bench = Bench()
    bench.start(policy_version=4, step=4)
    for ticket in bench.grant(num_permits=2):
        bench.put(ticket, policy_version=4)
    leased = bench.lease()
    with pytest.raises(Refused, match="step 4 must be above 4"):
        bench.acknowledge(leased, step=4, policy_version=5)
    with pytest.raises(Refused, match="policy_version 3 is below 4"):
        bench.acknowledge(leased, step=5, policy_version=3)
    with pytest.raises(Refused, match="step 5 cannot be committed: the last step acknowledged is 4"):
        bench.queue.commit(learner="L", step=5)


def test_only_the_learner_that_started_last_is_heard():
    bench = Bench()
    bench.start(learner="old")
    for ticket in bench.grant(num_permits=2):
        bench.put(ticket)
    leased = bench.lease(learner="old")
    bench.start(learner="new")
    with pytest.raises(Refused, match="learner 'old' is not the one that started last"):
        bench.acknowledge(leased, step=1, learner="old")
    assert bench.lease(learner="new") == leased


# Restarts


def test_a_restart_queues_lost_steps_again_in_their_old_order():
    bench = Bench(groups_per_step=2, max_staleness=4)
    bench.start()
    for ticket in bench.grant(num_permits=6):
        bench.put(ticket)
    for step in (1, 2):
        bench.acknowledge(bench.lease(2, lease_id=f"{step}"), step=step)
    bench.lease(2, lease_id="3")
    bench.start(policy_version=1, step=1, learner="M")
    assert bench.counters.trained == 2
    assert indices(bench.lease(4, learner="M")) == [2, 3, 4, 5]


def test_a_group_queued_again_forgets_the_step_it_was_trained_in():
    bench = Bench(groups_per_step=2)
    bench.start()
    bench.train(step=1)
    bench.start(policy_version=0, step=0)
    bench.start(policy_version=1, step=1)
    assert bench.counters.trained == 0
    assert bench.queue.ledger.count(TicketState.QUEUED) == 2


def test_a_restart_drops_what_was_sampled_under_lost_versions():
    bench = Bench(groups_per_step=2)
    bench.start()
    assert [bench.train(step=1), bench.train(step=2)] == [[0, 1], [2, 3]]
    bench.start(policy_version=0, step=0, learner="M")
    assert bench.counters.rewound == 2
    assert indices(bench.lease(2, learner="M")) == [0, 1]


def test_a_group_of_the_lost_lineage_is_dropped_even_when_the_version_is_reached_again():
    bench = Bench(groups_per_step=1, max_staleness=1)
    bench.start(policy_version=1, step=1)
    quick, slow = bench.grant(num_permits=2)
    bench.put(quick, policy_version=1)
    bench.start(policy_version=0, step=0, learner="M")
    assert bench.put(slow, policy_version=1) is PutOutcome.REWOUND
    assert bench.put(slow, policy_version=1) is PutOutcome.REWOUND
    assert bench.counters.rewound == 2
    assert indices(bench.grant(num_permits=9)) == [0, 1]


def test_a_learner_that_goes_on_above_what_was_served_takes_nothing_of_the_versions_between():
    bench = Bench(groups_per_step=3, max_staleness=9)
    bench.start(policy_version=5, step=5)
    before, between, slow = bench.grant(num_permits=3)
    bench.put(before, policy_version=2)
    bench.put(between, policy_version=4)
    bench.start(policy_version=6, step=2, resumed_version=2, learner="M")
    assert bench.counters.rewound == 1
    assert bench.put(slow, policy_version=6) is PutOutcome.REWOUND, "begun before, so partly of a version between"
    again, late = bench.grant(num_permits=2)
    assert (again.task_index, late.task_index) == (between.task_index, slow.task_index)
    assert [bench.put(ticket, policy_version=6) for ticket in (again, late)] == [PutOutcome.ACCEPTED] * 2
    assert indices(bench.lease(3, learner="M")) == [0, 1, 2]


def test_starting_again_with_the_same_step_changes_nothing():
    bench = Bench()
    bench.start()
    bench.train(step=1)
    bench.start(policy_version=1, step=1)
    before = copy.deepcopy(bench.queue.state)
    bench.start(policy_version=1, step=1)
    assert bench.queue.state == before


# What people read


def test_waiting_names_who_owes_how_many_and_when_it_was_heard():
    bench = Bench(groups_per_step=3, weights={"math": 1.0, "code": 1.0})
    assert why_waiting(bench.queue, 3) == "no learner has started yet, so no environment may sample"
    bench.start()
    first, *_ = bench.grant("math", 3)
    bench.put(first)
    bench.clock.now += 7.5
    assert why_waiting(bench.queue, 3) == (
        "1 of 3 groups are queued for policy version 0: "
        "'math' owes 2 (last heard 7.5 s ago), 'code' owes 0 (never heard of)"
    )
    assert why_waiting(bench.queue, 1) == ""


def test_status_counts_by_kind_and_environment():
    bench = Bench(groups_per_step=2, max_staleness=1, weights={"math": 1.0, "code": 2.0})
    bench.start()
    math, _ = bench.grant("math", 2)
    code, other = bench.grant("code", 2)
    for ticket in (math, code):
        bench.put(ticket)
    bench.lease(1)
    bench.queue.give_back(other.permit_id, "")
    status = queue_status(bench.queue)
    assert (status.num_permits, status.num_queued, status.num_leased, status.capacity) == (1, 1, 1, 4)
    assert status.environments["code"].num_to_retry == 1
    assert status.environments["code"].num_queued == 1
    assert status.counters["granted"] == 4


# All together


class QueueMachine(RuleBasedStateMachine):
    """Random use, restarts of learner, server and environments included. Books are kept beside the queue's."""

    @initialize(groups_per_step=st.integers(1, 3), max_staleness=st.integers(0, 2), max_refills=st.integers(0, 2))
    def build(self, groups_per_step, max_staleness, max_refills):
        self.bench = Bench(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            weights={"a": 1.0, "b": 2.0},
            max_faults=1,
            max_refills=max_refills,
        )
        self.effect: dict[tuple[str, int], int] = {}
        self.saved: set[int] = {0}
        self.lease_number = itertools.count()

    @property
    def queue(self) -> TrajectoryQueue:
        return self.bench.queue

    def settled(self, state):
        return [ticket for ticket in self.queue.ledger._settled.values() if ticket.state is state]

    def some(self, data, state):
        found = self.queue.ledger.within(state)
        return data.draw(st.sampled_from(found)) if found else None

    @rule(environment=st.sampled_from("ab"), num_permits=st.integers(1, 5))
    def grant(self, environment, num_permits):
        granted = self.bench.grant(environment, num_permits)
        assert len(granted) <= num_permits
        if granted:
            assert self.queue.ledger.num_free >= 0

    @rule(
        data=st.data(),
        behind=st.integers(-1, 2),
        rewards=st.sampled_from([(1.0, 0.0), (1.0, 1.0), (None, 1.0), (None, None)]),
    )
    def put(self, data, behind, rewards):
        ticket = self.some(data, TicketState.PERMITTED)
        version = self.queue.state.policy_version - behind
        if ticket is None or version < 0:
            return
        try:
            self.bench.put(ticket, policy_version=version, rewards=rewards)
        except Refused:
            assert behind < 0 or ticket.state is TicketState.EXPIRED

    @rule(data=st.data(), reason=st.sampled_from(["", "crashed"]))
    def give_back(self, data, reason):
        ticket = self.some(data, TicketState.PERMITTED)
        if ticket:
            self.queue.give_back(ticket.permit_id, reason)

    @precondition(lambda self: self.queue.state.policy_version >= 0)
    @rule(acknowledge=st.booleans())
    def train(self, acknowledge):
        leased = self.bench.lease(self.bench.limits.groups_per_step, lease_id=f"{next(self.lease_number)}")
        served = self.queue.state.policy_version
        order = [t.sequence or 0 for t in leased]
        assert order == sorted(order)
        versions = [(t.oldest or 0, t.newest or 0) for t in leased]
        assert all(served - self.bench.limits.max_staleness <= old <= new <= served for old, new in versions)
        if leased and acknowledge:
            step = self.queue.state.step + 1
            self.bench.acknowledge(leased, step=step, policy_version=served + 1)
            self.effect |= {(t.environment, t.task_index): step for t in leased}

    @precondition(lambda self: self.queue.state.policy_version >= 0)
    @rule()
    def checkpoint(self):
        """Saves first, then commits; the process may die in between."""
        self.saved.add(self.queue.state.step)
        self.queue.commit(learner="L", step=self.queue.state.step)

    @rule()
    def restart_learner(self):
        """From the last checkpoint: exactly the tasks whose effect it holds are trained."""
        step = max(self.saved)
        self.bench.start(policy_version=step, step=step)
        self.effect = {task: trained_in for task, trained_in in self.effect.items() if trained_in <= step}
        trained = {(t.environment, t.task_index): t.step for t in self.settled(TicketState.TRAINED)}
        assert trained == self.effect

    @rule()
    def restart_server(self):
        live = copy.deepcopy(list(self.queue.ledger.live.values()))
        settled = copy.deepcopy(list(self.queue.ledger._settled.values()))
        self.bench.queue = TrajectoryQueue(
            self.bench.limits,
            self.bench.weights,
            clock=self.bench.clock,
            new_id=lambda: f"p{next(self.bench.ids)}",
            state=copy.deepcopy(self.queue.state),
            tickets=settled + live,
        )

    @rule(seconds=st.sampled_from([1.0, 60.0, 100.0]))
    def wait(self, seconds):
        self.bench.clock.now += seconds

    @invariant()
    def every_index_is_in_one_place(self):
        """Trained once, live, waiting to go out again, or done with untrained: never two of these, never none."""
        done_with = 0
        for name, line in self.queue.state.lines.items():
            trained = [t.task_index for t in self.settled(TicketState.TRAINED) if t.environment == name]
            live = [t.task_index for t in self.queue.ledger.live.values() if t.environment == name]
            places = trained + live + line.returned
            assert len(places) == len(set(places))
            assert line.returned == sorted(line.returned)
            done_with += len(set(range(line.next_index)) - set(places))
        assert done_with == self.queue.state.counters.abandoned + self.queue.state.counters.replaced

    @invariant()
    def every_permit_is_accounted_for(self):
        counters = self.queue.state.counters
        ends = counters.failed + counters.returned + counters.expired_permits + counters.stale + counters.rewound
        assert counters.granted == ends + counters.replaced + counters.trained + self.queue.ledger.count(*LIVE)
        assert counters.accepted >= counters.trained + self.queue.ledger.count(*HOLDS_GROUP)


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestQueueMachine = QueueMachine.TestCase
