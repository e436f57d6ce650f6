"""The engine behind the routes, and what is proved of its weights."""

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, field
from typing import Any

from syncline.bridges.adapter import is_adapter_name
from syncline.bridges.measure import Reading, Wholes
from syncline.bridges.receipt import model_digest
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapters import Adapters
from syncline.engines.vllm.gate import UNPUBLISHED, Gate
from syncline.errors import EngineError, EngineTimeout, SyncError
from syncline.protocols import Receipt


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
    digest: str = ""
    """Of `parameters`, which `hold` sets."""
    bridge_pause: int = 0
    """The last pause that a bridge began; orders of an earlier one come after its learner gave up. 0: none."""
    measured_in: int | None = None
    """The pause when `parameters` were measured: after a later one has begun, somebody may have written the weights."""
    handed: dict[str, str] = field(default_factory=dict)
    """Digests of what was loaded and then repacked, by checkpoint name."""
    restart_from: Restart | None = None
    generation: str = ""
    """Of the learner's process group the workers are in; empty: in none."""
    torn: str | None = None
    """Why the weights are of no version: somebody began to replace them. Naming them ends it, nothing else does."""
    wholes: Wholes = field(default_factory=Wholes)
    """Of the weights that the ranks measure."""
    adapter_wholes: Wholes = field(default_factory=Wholes)
    """Of the last adapter whose slots they read."""
    num_asked: int = 0
    """Calls that the ranks have not answered yet."""
    _core: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of whoever stops the engine core, or lets it go on: what the gate says of it changes with it."""

    async def measured(self, method: str = "syncline_measure", *args: Any) -> dict[str, str]:
        """What the next request would be sampled from: the weights, and the adapter that is current."""
        measured = await self._digests(self.wholes, await self.each_rank(method, *args), "syncline_pieces")
        if current := self.adapters.current:
            measured |= await self.digests_of(current.id, await self.each_rank("syncline_held", current.id))
        return measured | self.handed

    async def digests_of(self, adapter_id: int, answers: list[Any]) -> dict[str, str]:
        """Of an adapter, from what every rank read of its slot."""
        return await self._digests(self.adapter_wholes, answers, "syncline_held_pieces", adapter_id)

    async def _digests(self, wholes: Wholes, answers: list[Any], pieces: str, *args: Any) -> dict[str, str]:
        """From every rank's reading. `pieces`: what tells of which pieces, asked where these are others than before."""
        readings = [Reading(*answer) for answer in answers]
        if not wholes.knows(readings):
            wholes.learn(readings, await self.each_rank(pieces, *args), num_stages=self.num_stages)
        return wholes.digests(readings)

    @property
    def num_stages(self) -> int:
        """Of vLLM's pipeline parallelism; ranks come stage by stage."""
        return self.engine.vllm_config.parallel_config.pipeline_parallel_size

    async def each_rank(self, method: str, *args: Any) -> list[Any]:
        """What every rank answers, in rank order. Raises `SyncError` with what a rank cannot do."""
        self.num_asked += 1
        try:
            answers = await self.engine.collective_rpc(method, args=args)
        finally:
            self.num_asked -= 1
        faults = [f"rank {rank}: {answer['fault']}" for rank, answer in enumerate(answers) if "fault" in answer]
        if faults:
            raise SyncError("\n".join(faults))
        return [answer["value"] for answer in answers]

    async def remeasure(self) -> None:
        self.measured_in = self.gate.num_pauses
        self.hold(await self.measured())

    def hold(self, parameters: dict[str, str]) -> None:
        self.parameters, self.digest = parameters, model_digest(parameters)

    def base_parameters(self) -> dict[str, str]:
        return {name: digest for name, digest in self.parameters.items() if not is_adapter_name(name)}

    def sample_from_current(self) -> None:
        """`parameters` are the base's and those of the adapter that new requests get."""
        current = self.adapters.current
        self.hold(self.base_parameters() | (current.parameters if current else {}))

    def refuse_backwards(self, policy_version: int) -> None:
        if policy_version < self.gate.policy_version:
            raise EngineError(
                f"policy_version {policy_version} is older than {self.gate.policy_version}, which this engine served"
            )

    async def pause(self, pause: int, mode: str, *, timeout_seconds: float, reuse_kv: bool = False) -> None:
        """Stops the engine core, as `EngineControl.pause` tells; `pause` has closed the gate. Raises `EngineTimeout`,
        and `EngineError` where others have resumed it or paused it again meanwhile."""
        gate = self.gate
        waits = {"drain": gate.wait_until_empty, "keep": gate.wait_until_freezable, "abort": gate.wait_until_submitted}
        await waits[mode](timeout_seconds=timeout_seconds)
        await _within(timeout_seconds, self._core.acquire(), "end another pause, or go on,")
        try:
            gate.need(pause)
            await _within(timeout_seconds, compat.pause(self.engine, mode, reuse_kv=reuse_kv), "stop sampling")
            if mode != "keep":
                await gate.wait_until_empty(timeout_seconds=timeout_seconds)
            gate.freeze(pause)
        finally:
            self._core.release()

    async def go_on(self, pause: int) -> None:
        """Samples what it holds. Raises `EngineError` when another pause has begun since."""
        async with self._core:
            self.gate.need(pause)
            self.gate.is_still = False
            await self.engine.resume_generation()
            self.gate.open(pause)

    async def resume(self, expected: Receipt) -> None:
        """Samples, if it holds exactly what is expected; raises `EngineError` otherwise, and when paused meanwhile."""
        pause = self.gate.num_pauses
        if self.torn:
            raise EngineError(f"the weights are of no version; publish one instead of resuming: {self.torn}")
        if self.held != expected:
            raise EngineError(
                f"asked to resume version {expected.policy_version} digest {expected.digest[:12]}, this engine holds "
                f"version {self.held.policy_version} digest {self.held.digest[:12]}; publish instead of resuming"
            )
        if self.gate.is_still or not self.gate.is_open:
            await self._refuse_unproved()
            await self.go_on(pause)

    async def _refuse_unproved(self) -> None:
        """Raises `EngineError` when the weights are no longer those of the version they were named with."""
        pause = self.gate.num_pauses
        if self.measured_in == pause:
            return
        if await self.measured() != self.parameters:
            raise EngineError(
                f"the weights have changed since they were named version {self.gate.policy_version}; publish a new "
                "version instead of resuming"
            )
        self.measured_in = pause

    def tear(self, why: str) -> None:
        """Until they are named anew the weights have no version, and no digest that anybody measured."""
        self.torn = why
        self.hold({name: f"{digest.partition(':')[0]}:torn" for name, digest in self.parameters.items()})

    @property
    def held(self) -> Receipt:
        unnamed = self.torn or self.adapters.by_hand
        return Receipt(UNPUBLISHED if unnamed else self.gate.policy_version, self.digest)

    def receipt(self) -> dict[str, Any]:
        return {**asdict(self.held), "paused": not self.gate.is_open, "pause": self.bridge_pause}

    def refuse_late(self, pause: int | None) -> None:
        """Raises `EngineError` for an order of a pause (`routes.Order`) that is not the last that a bridge began."""
        if pause not in (None, self.bridge_pause):
            raise EngineError(
                f"asked in pause {pause}, and a bridge has begun pause {self.bridge_pause} of it since; pause it anew"
            )

    def need_paused(self, action: str, pause: int | None = None) -> int:
        """Returns the pause's number; an order's own is checked (`refuse_late`)."""
        self.refuse_late(pause)
        if not self.gate.is_still:
            raise EngineError(f"{action} needs a paused engine, and requests may be sampling; pause it first")
        return self.gate.num_pauses

    async def name(self, expected: Receipt, *measure: Any, pause: int, resume: bool = False) -> dict[str, Any]:
        """Measures (`measure`: otherwise than `measured` does by itself). What it then holds is a new version, if it is
        what was expected; otherwise it is of none, and cannot be resumed. Once `pause` is over nobody waits for the
        answer any more: raises `EngineError`, and names nothing."""
        parameters = await self.measured(*measure)
        proved = model_digest(parameters) == expected.digest
        if proved:
            await compat.name_weights(self.engine, expected.policy_version)
        sampled = await compat.sampled_tokens(self.engine) if proved else {}
        self.need_paused("naming weights")
        self.gate.need(pause)
        self.refuse_backwards(expected.policy_version)
        self.hold(parameters)
        self.measured_in = pause
        if not proved:
            self.torn = f"the weights are not those of version {expected.policy_version}, which was published"
            return self.receipt()
        self.gate.name(expected.policy_version, sampled)
        self.torn = None
        if resume:
            await self.resume(expected)
        return self.receipt()


async def _within(timeout_seconds: float, answer: Awaitable[object], what: str) -> None:
    try:
        await asyncio.wait_for(answer, timeout_seconds)
    except TimeoutError as error:
        raise EngineTimeout(f"the engine core did not {what} in {timeout_seconds:g} s") from error
