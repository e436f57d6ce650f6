"""The last door before the loss: no token is trained on whose weights engine and learner have not proved alike, and
none that the model does not know.

A `publish` returns only with a proof, versions grow by one, and a checkpoint holds none but proved ones. So what is
proved is every version up to the one published last; a token of a later one was sampled by an engine that nobody
synced, or by a life of the run that was lost. Where that life's engines outlived it, this one's versions begin above
theirs, and those between, `lost`, prove nothing. (That every sampled token has a version, the data type sees to; where
`learner.unrecorded` accepts samples without, nobody knows.)
"""

from collections.abc import Iterable

from syncline.errors import SyncError, TrainingError
from syncline.types import RolloutGroup


def refuse_unproved(groups: Iterable[RolloutGroup], *, proved: int, lost: range = range(0)) -> None:
    """Raises `SyncError` naming the first group with a token of a version above `proved`, or of one that is `lost`."""
    for group in groups:
        if found := group.policy_versions.intersection(lost):
            raise SyncError(
                f"group {group.group_id!r} of {group.environment} holds tokens of policy version {min(found)}, which "
                f"an earlier life of the run published and this one, which goes on from {lost.start - 1}, never held"
            )
        newest = group.newest_policy_version
        if newest is not None and newest > proved:
            raise SyncError(
                f"group {group.group_id!r} of {group.environment} holds tokens of policy version {newest}, and the "
                f"last whose weights engine and learner proved alike is {proved}; none of it is trained on. An engine "
                "that this run does not sync must not be sampled from: give its environment this run's --engine-url"
            )


def refuse_unknown_tokens(groups: Iterable[RolloutGroup], *, vocabulary_size: int) -> None:
    """Raises `TrainingError` naming the first group with a token that the model has no row for. A GPU would read beyond
    the embedding, and a sequence's last token, which is only predicted, would be learned as another."""
    for group in groups:
        largest = max((max(sample.token_ids) for rollout in group.rollouts for sample in rollout.samples), default=0)
        if largest >= vocabulary_size:
            raise TrainingError(
                f"group {group.group_id!r} of {group.environment} holds token {largest}, and the model knows those "
                f"below {vocabulary_size}; tokenise with the model's own tokenizer"
            )
