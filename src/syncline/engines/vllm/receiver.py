"""A worker's place in a learner's process group. Faults are answers here: an exception would cross vLLM's RPC as text
of vLLM's own, and the engine must live on to join the next learner."""

from collections.abc import Mapping
from concurrent.futures import Future

import torch

from syncline.bridges.buckets import refuse_unplanned
from syncline.bridges.collective import Deadline, Group
from syncline.bridges.invitation import Invitation, same_gpu
from syncline.bridges.manifest import Shard
from syncline.bridges.pipeline import Receiver
from syncline.errors import SyncError


class Member:
    """One worker in one group, from joining it to leaving it."""

    def __init__(self, invitation: Invitation, *, rank: int, device: torch.device) -> None:
        self._invitation = invitation
        self._rank = rank
        self._device = device
        self._receiver: Receiver | None = None
        """`None` before joining, and once the group is of no further use."""
        self.closing: Future[None] | None = None

    def join(self, shards: Mapping[str, Shard], *, timeout_seconds: float) -> dict[str, str]:
        """`plan`: the digest of this side's plan; or `fault`."""
        invitation = self._invitation
        if same_gpu(invitation.device, self._device):
            return {"fault": f"the learner is on this engine's GPU {invitation.device}; set bridge.name to shared"}
        try:
            refuse_unplanned(invitation.manifest, shards)
            planned = invitation.plan()
            deadline = Deadline.after(timeout_seconds)
            group = Group.connect(invitation.seat(self._rank), self._device, deadline=deadline, watch=_nobody)
            self._receiver = Receiver(planned, group, shards, self._device)
        except SyncError as error:
            return {"fault": str(error)}
        return {"plan": planned.digest}

    def receive(self, generation: str, *, timeout_seconds: float) -> dict[str, str]:
        """Nothing, or `fault`. After a fault this worker has left the group."""
        if self._receiver is None or generation != self._invitation.generation:
            return {"fault": f"this worker is not in the learner's group {generation}"}
        try:
            self._receiver.receive(deadline=Deadline.after(timeout_seconds))
        except SyncError as error:
            self.leave()
            return {"fault": f"rank {self._rank} waited for the learner (rank 0): {error}"}
        return {}

    def leave(self) -> None:
        """Its connections close on their own: the engine lives on."""
        if self._receiver is not None:
            self.closing = self._receiver.group.leave("")
            self._receiver = None


def _nobody() -> None:
    """Before the group is connected there is nobody to watch; the deadline is all."""
