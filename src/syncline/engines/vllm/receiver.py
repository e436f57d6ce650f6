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
        self._joined: tuple[Group, Receiver] | None = None
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
            receiver = Receiver(planned, shards, self._device)
            seat = invitation.seat(self._rank)
            self._joined = Group.join(seat, self._device, deadline=Deadline.after(timeout_seconds)), receiver
        except SyncError as error:
            return {"fault": f"rank {self._rank} could not join the learner: {error}"}
        return {"plan": planned.digest}

    def receive(self, generation: str, *, timeout_seconds: float) -> dict[str, str]:
        """Nothing, or `fault`. After a fault this worker has left the group."""
        if self._joined is None or generation != self._invitation.generation:
            return {"fault": f"this worker is not in the learner's group {generation}"}
        group, receiver = self._joined
        try:
            receiver.receive(group, deadline=Deadline.after(timeout_seconds))
        except SyncError as error:
            self.leave()
            return {"fault": f"rank {self._rank} waited for the learner (rank 0): {error}"}
        return {}

    def leave(self) -> None:
        """Its connections close on their own: the engine lives on."""
        if self._joined is not None:
            self.closing = self._joined[0].leave("")
            self._joined = None
