"""The engine behind the routes, and what is proved of its weights."""

from dataclasses import dataclass, field
from typing import Any

from syncline.bridges.adapter import is_adapter_name
from syncline.bridges.receipt import combined, model_digest
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapters import Adapters
from syncline.engines.vllm.gate import UNPUBLISHED, Gate
from syncline.errors import EngineError, SyncError


@dataclass(frozen=True, slots=True)
class Restart:
    """What the process starts from again."""

    path: str
    policy_version: int


@dataclass(slots=True)
class Served:
    """See the module."""

    engine: Any
    gate: Gate
    about: dict[str, str]
    shares: bool = False
    """Other processes may open its weights."""
    adapters: Adapters = field(default_factory=Adapters)
    parameters: dict[str, str] = field(default_factory=dict)
    is_measured: bool = False
    """`parameters` tells what the engine holds now; not so once it was paused, when somebody may write the weights."""
    restart_from: Restart | None = None
    generation: str = ""
    """Of the learner's process group the workers are in; empty: in none."""
    torn: str | None = None
    """Why the weights are of no version: somebody began to replace them. Naming them ends it, nothing else does."""

    async def measured(self, method: str = "syncline_parameters", *args: Any) -> dict[str, str]:
        """What the next request would be sampled from: the weights, and the adapter that is current."""
        measured = combined(await self.each_rank(method, *args))
        if current := self.adapters.current:
            measured |= combined(await self.each_rank("syncline_held", current.id))
        return measured

    async def each_rank(self, method: str, *args: Any) -> list[Any]:
        """What every tensor-parallel rank answers, in rank order. Raises `SyncError` with what a rank cannot do."""
        answers = await self.engine.collective_rpc(method, args=args)
        faults = [f"rank {rank}: {answer['fault']}" for rank, answer in enumerate(answers) if "fault" in answer]
        if faults:
            raise SyncError("\n".join(faults))
        return [answer["value"] for answer in answers]

    async def remeasure(self, method: str = "syncline_parameters", *args: Any) -> None:
        self.parameters = await self.measured(method, *args)
        self.is_measured = True

    def base_parameters(self) -> dict[str, str]:
        return {name: digest for name, digest in self.parameters.items() if not is_adapter_name(name)}

    def sample_from_current(self) -> None:
        """`parameters` are the base's and those of the adapter that new requests get."""
        current = self.adapters.current
        self.parameters = self.base_parameters() | (current.parameters if current else {})

    def refuse_backwards(self, policy_version: int) -> None:
        if policy_version < self.gate.policy_version:
            raise EngineError(
                f"policy_version {policy_version} is older than {self.gate.policy_version}, which this engine served"
            )

    async def refuse_unproved(self) -> None:
        """Raises `EngineError` when the weights are no longer those of the version they were named with."""
        if self.is_measured:
            return
        if await self.measured() != self.parameters:
            raise EngineError(
                f"the weights have changed since they were named version {self.gate.policy_version}; publish a new "
                "version instead of resuming"
            )
        self.is_measured = True

    def tear(self, why: str) -> None:
        """Until they are named anew the weights have no version, and no digest that anybody measured."""
        self.torn = why
        self.parameters = {name: f"{digest.partition(':')[0]}:torn" for name, digest in self.parameters.items()}

    def receipt(self) -> dict[str, Any]:
        return {
            "policy_version": UNPUBLISHED if self.torn or self.adapters.by_hand else self.gate.policy_version,
            "digest": model_digest(self.parameters),
            "paused": not self.gate.is_open,
        }

    def need_paused(self, action: str) -> None:
        if not self.gate.is_still:
            raise EngineError(f"{action} needs a paused engine, and requests may be sampling; pause it first")

    async def name(self, policy_version: int) -> dict[str, Any]:
        """What was measured last is `policy_version`. The pause dropped every KV block, and none was filled since."""
        self.refuse_backwards(policy_version)
        await compat.name_weights(self.engine, policy_version)
        self.gate.name(policy_version, await compat.sampled_tokens(self.engine))
        self.torn = None
        return self.receipt()
