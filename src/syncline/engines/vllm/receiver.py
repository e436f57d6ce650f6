"""A worker's place in a learner's process group."""

from collections.abc import Iterable
from concurrent.futures import Future

import torch

from syncline.bridges.buckets import refuse_unplanned
from syncline.bridges.collective import Deadline, Group
from syncline.bridges.invitation import Invitation, same_gpu
from syncline.bridges.manifest import Shard
from syncline.bridges.pipeline import Receiver
from syncline.bridges.sparse import SparseReceiver
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

    def join(self, shards: Iterable[tuple[str, Shard]], *, timeout_seconds: float) -> str:
        """Returns the digest of this side's plan; raises `SyncError`."""
        invitation = self._invitation
        if same_gpu(invitation.device, self._device):
            raise SyncError(f"the learner is on this engine's GPU {invitation.device}; set bridge.name to shared")
        held = list(shards)
        refuse_unplanned(invitation.manifest, held)
        end = SparseReceiver if invitation.sparse else Receiver
        receiver = end(invitation.plan(), held, self._device)
        seat = invitation.seat(self._rank)
        self._joined = Group.join(seat, self._device, deadline=Deadline.after(timeout_seconds)), receiver
        return receiver.plan.digest

    def receive(self, generation: str, *, timeout_seconds: float) -> None:
        """Takes one version. Raises `SyncError`; this worker has then left the group."""
        if self._joined is None or generation != self._invitation.generation:
            raise SyncError(f"this worker is not in the learner's group {generation}")
        group, receiver = self._joined
        try:
            receiver.receive(group, deadline=Deadline.after(timeout_seconds))
        except SyncError as error:
            self.leave()
            raise SyncError(f"waited for the learner: {error}") from error

    def leave(self) -> None:
        """Its connections close on their own: the engine lives on."""
        if self._joined is not None:
            self.closing = self._joined[0].leave("")
            self._joined = None
