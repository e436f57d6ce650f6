"""An engine of plain tensors in this process: it loads checkpoints, and has the `broadcast` bridge's real receiving
end, without a vLLM around it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from syncline.bridges.collective import CLOSE_SECONDS, in_thread
from syncline.bridges.invitation import Invitation
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.engines.vllm.receiver import Member
from syncline.errors import EngineError
from syncline.protocols import Membership, Paused, Receipt, Received

CPU = torch.device("cpu")


class FakeEngine:
    """Starts with zeros of the shapes in `like`, cut by rows over `num_workers`, whose members are real, on threads."""

    def __init__(self, name: str, like: Mapping[str, torch.Tensor], *, num_workers: int = 1) -> None:
        self.name = name
        self.calls: list[str] = []
        self.before_receive: Callable[[], None] = lambda: None
        """A fault to inject: what it raises is the answer to `receive_broadcast`."""
        self.after_receive: Callable[[], object] = lambda: None
        """Another: what it does to the weights is found by the proof."""
        self._held = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._num_workers = num_workers
        self._members: list[Member] = []
        self._closing: list[Future[None]] = []
        self.restart()

    def restart(self) -> None:
        """A new process: the weights it started with, no version, in no group."""
        for tensor in self._held.values():
            tensor.zero_()
        self._version = -1
        self._leave()

    def _leave(self) -> None:
        for member in self._members:
            member.leave()
            self._closing += [member.closing] if member.closing else []
        self._generation, self._members = "", list[Member]()

    def close(self) -> None:
        """After the learner's end: connections close when both have left."""
        self._leave()
        wait_for(self._closing, timeout=CLOSE_SECONDS)

    def _shards(self, rank: int) -> list[tuple[str, Shard]]:
        return [(name, self._shard(tensor, rank)) for name, tensor in self._held.items()]

    def _shard(self, tensor: torch.Tensor, rank: int) -> Shard:
        first, last = (tensor.shape[0] * r // self._num_workers for r in (rank, rank + 1))
        return Shard(tensor[first:last], tuple(tensor.shape), (first,) + (0,) * (tensor.dim() - 1))

    def held(self, name: str) -> torch.Tensor:
        return self._held[name]

    def wait_until_ready(self, *, timeout_seconds: float) -> None:
        del timeout_seconds

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool = False) -> Paused:
        del timeout_seconds, reuse_kv
        self.calls.append(f"pause {mode}")
        return Paused(self.receipt(), self._generation)

    def resume(self, expected: Receipt) -> None:
        self.calls.append("resume")
        if self.receipt() != expected:
            raise EngineError(f"{self.name} holds something else")

    def receipt(self) -> Receipt:
        return Receipt(self._version, model_digest(self.parameters()))

    def parameters(self) -> Mapping[str, str]:
        return parameter_digests(self._held.items())

    def adopt(self, expected: Receipt, *, resume: bool = False) -> Receipt:
        self.calls.append("adopt")
        return self._name(expected, resume)

    def _name(self, expected: Receipt, resume: bool) -> Receipt:
        if self.receipt().digest != expected.digest:
            self._version = -1
            return self.receipt()
        self._version = expected.policy_version
        if resume:
            self.resume(expected)
        return self.receipt()

    def reload(self, path: str, *, expected: Receipt, timeout_seconds: float) -> Receipt:
        del timeout_seconds
        self.calls.append("reload")
        for file in Path(path).glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                self._held[name].copy_(tensor)
        return self._name(expected, resume=False)

    def membership(self) -> Membership:
        return Membership(self._num_workers, self._generation)

    def join_broadcast(self, invitation: Mapping[str, Any], *, first_rank: int, timeout_seconds: float) -> str:
        self.calls.append("join")
        self._leave()
        asked = Invitation.from_wire(invitation)
        self._members = [Member(asked, rank=first_rank + i, device=CPU) for i in range(self._num_workers)]
        joining = [
            in_thread(lambda i=i, one=one: one.join(self._shards(i), timeout_seconds=timeout_seconds))
            for i, one in enumerate(self._members)
        ]
        [plan] = set(_answers(joining))
        self._generation = asked.generation
        return plan

    def receive_broadcast(
        self, expected: Receipt, *, generation: str, timeout_seconds: float, resume: bool = False
    ) -> Received:
        self.calls.append("receive")
        self._version = -1
        try:
            self.before_receive()
            receiving = [
                in_thread(lambda one=one: one.receive(generation, timeout_seconds=timeout_seconds))
                for one in self._members
            ]
            _answers(receiving)
        except EngineError:
            self._leave()
            raise
        self.after_receive()
        return Received(self._name(expected, resume), prove_seconds=0.0)

    def export(self) -> Mapping[str, Any]:
        raise EngineError(f"{self.name} shares nothing")


def _answers(workers: Sequence[Future[Any]]) -> list[Any]:
    """As the engine's routes do: every worker's fault, or every worker's answer."""
    wait_for(workers, timeout=60)
    if faults := [f"rank {rank}: {worker.exception()}" for rank, worker in enumerate(workers) if worker.exception()]:
        raise EngineError("\n".join(faults))
    return [worker.result() for worker in workers]
