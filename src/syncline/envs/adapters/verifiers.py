"""Environments written for Prime Intellect's `verifiers` 0.1.10, unchanged: their turns, tools and rubrics.

A rollout of theirs talks to an `AsyncOpenAI` client. Ours looks like one (`_Client`), and samples through the `Policy`:
it renders each request after the tokens of the turns before, so that what was sampled is trained on as it was sampled.
Sampling is the run's; an environment's own sampling arguments are not used. Their rubrics make a reward function that
raises a 0.0; here it is an `ERROR` without a reward.
"""

import functools
import inspect
import json
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace, TracebackType
from typing import Any

from syncline.envs.conversation import Conversation, together
from syncline.envs.rows import Rows, Source
from syncline.envs.scoring import Score, boundary
from syncline.envs.toolbox import CALL, instructions, responses
from syncline.errors import ConfigError, EngineError
from syncline.protocols import Policy
from syncline.types import FinishReason, Message, Rollout

SUPPORTED = "0.1.10"
"""The newest whose requirements are met beside vLLM's; each release before and after has another interface."""


class Verifiers:
    """`env_id` is the installed environment's name, as for `verifiers.load_environment`, and `env_args` its arguments.

    Every function of its rubric is a part of the reward. `correct` names the one that says right or wrong, for
    evaluation.
    """

    name = "verifiers"

    def __init__(
        self, *, env_id: str, env_args: Mapping[str, Any] | None = None, correct: str | None = None, seed: int = 0
    ) -> None:
        self._environment = _load(env_id, env_args or {})
        self._correct = correct
        self._faults: ContextVar[list[str]] = ContextVar("faults of reward functions")
        self._scores_groups = False
        self._guard(self._environment.rubric)
        train = _rows(self._environment.get_dataset(), f"{env_id} train")
        self._rows = Rows(
            train, self._heldout, build=lambda row, where: row, key=lambda row: repr(row["prompt"]), seed=seed
        )
        self.num_train_tasks = len(self._rows.train)

    def task(self, index: int, *, split: str = "train") -> dict[str, Any]:
        """A row of their data set: prompt, answer, info."""
        return self._rows.task(index, split=split)

    async def rollouts(self, task: dict[str, Any], num_rollouts: int, policy: Policy) -> list[Rollout]:
        clients = [_Client(policy) for _ in range(num_rollouts)]
        states = await together([self._attempt(task, client) for client in clients])
        for client in clients:
            if client.engine_fault is not None:
                raise client.engine_fault
        alive = [i for i, client in enumerate(clients) if client.conversation.fault is None]
        outcomes = await self._score([states[i] for i in alive])
        by_index = dict(zip(alive, outcomes, strict=True))
        return [client.conversation.rollout(*by_index.get(i, (None, None))) for i, client in enumerate(clients)]

    async def _attempt(self, task: dict[str, Any], client: "_Client") -> Any:
        """Their state at the end; what went wrong on the way is the conversation's fault."""
        conversation = client.conversation
        state, conversation.fault = await boundary(
            "rollout", lambda: self._environment.rollout(dict(task), client, "policy", {})
        )
        if state is None:
            return None
        if state["error"] is not None:
            conversation.fault = f"rollout ended in {state['error']!r}: {state['error'].__cause__ or ''}"
        elif not conversation.samples:
            conversation.fault = "the environment asked the model nothing, or more than its context holds"
        conversation.out_of_room = conversation.out_of_room or bool(state.get("prompt_too_long"))
        return state

    async def _score(self, states: Sequence[Any]) -> list[tuple[Score | None, str | None]]:
        """A score or a fault for each state; functions that compare siblings share the group's fate."""
        if not states:
            return []
        if self._scores_groups:
            return await self._scored(states)
        return [outcome for [outcome] in await together([self._scored([state]) for state in states])]

    async def _scored(self, states: Sequence[Any]) -> list[tuple[Score | None, str | None]]:
        faults: list[str] = []
        self._faults.set(faults)
        _, fault = await boundary("rubric", lambda: self._environment.rubric.score_group(list(states)))
        if fault or faults:
            return [(None, fault or faults[0])] * len(states)
        return [await boundary("rubric", lambda state=state: self._score_of(state)) for state in states]

    def _score_of(self, state: Any) -> Score:
        parts = {name: float(value) for name, value in (state["metrics"] or {}).items() if math.isfinite(value)}
        if self._correct is not None:
            parts["correct"] = parts[self._correct]
        return Score(float(state["reward"]), parts)

    def _guard(self, rubric: Any) -> None:
        """Every function of the rubric tells of its exceptions before the rubric makes them a 0.0."""
        members = [environment.rubric for environment in getattr(rubric, "env_map", {}).values()]
        for member in (*members, *getattr(rubric, "rubrics", ())):
            self._guard(member)
        self._scores_groups |= any(rubric._is_group_func(function) for function in rubric.funcs)
        rubric.funcs = [self._guarded(function) for function in rubric.funcs]

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(function)
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            with _Told(function.__name__, self._faults.get()):
                value = function(*args, **kwargs)
                value = await value if inspect.isawaitable(value) else value
                return [float(one) for one in value] if isinstance(value, list | tuple) else float(value)

        return guarded

    def _heldout(self) -> Source:
        environment = self._environment
        if environment.eval_dataset is None and environment.eval_dataset_source is None:
            raise ConfigError([f"evaluation.num_tasks: {environment.env_id} has no evaluation data set; set it to 0"])
        return _rows(environment.get_eval_dataset(), f"{environment.env_id} evaluation")


class _Told:
    """Writes down the exception that leaves it."""

    def __init__(self, name: str, faults: list[str]) -> None:
        self._name, self._faults = name, faults

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._faults.append(f"{self._name} raised {type(error).__name__}: {error}")


class _Client:
    """The part of `AsyncOpenAI` that a rollout uses, over one conversation."""

    def __init__(self, policy: Policy) -> None:
        self.conversation = Conversation(policy, ())
        self.engine_fault: EngineError | None = None
        """Theirs would take it for the model's answer; it is raised once the rollout has ended."""
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))
        self.completions = SimpleNamespace(create=self._complete)
        self._said: dict[str, str] = {}
        """What was sampled, by the id of its first tool call."""

    async def _chat(self, *, messages: Sequence[Mapping[str, Any]], tools: Any = None, **_: Any) -> Any:
        from openai.types.chat import ChatCompletion

        text = await self._sample(_translated(messages, tools or (), self._said))
        calls = (
            [_tool_call(call, f"call_{len(self._said)}_{i}") for i, call in enumerate(CALL.findall(text))]
            if tools
            else []
        )
        calls = [call for call in calls if call is not None]
        message: dict[str, Any] = {"role": "assistant", "content": text or " "}
        if calls:
            self._said[calls[0]["id"]] = text
            message |= {"content": text.partition("<tool_call>")[0].rstrip(), "tool_calls": calls}
        choice = {"index": 0, "finish_reason": self._reason(bool(calls)), "message": message}
        return ChatCompletion.model_validate(_envelope("chat.completion", choice))

    async def _complete(self, *, prompt: str, **_: Any) -> Any:
        from openai.types import Completion

        text = await self._sample((Message("user", prompt),))
        choice = {"index": 0, "finish_reason": self._reason(False), "text": text or " "}
        return Completion.model_validate(_envelope("text_completion", choice))

    async def _sample(self, messages: tuple[Message, ...]) -> str:
        """The text that follows the messages. Raises what a server of theirs would."""
        conversation = self.conversation
        conversation.messages = messages
        try:
            await conversation.ask()
        except EngineError as error:
            self.engine_fault = error
            raise
        if conversation.out_of_room:
            raise _overlong()
        if conversation.fault or conversation.finish_reason is FinishReason.ABORT:
            raise RuntimeError(conversation.fault or "the engine aborted the request")
        return conversation.answer

    def _reason(self, has_calls: bool) -> str:
        return "tool_calls" if has_calls else str(self.conversation.finish_reason)


def _translated(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], said: Mapping[str, str]
) -> tuple[Message, ...]:
    """OpenAI's messages as ours: tools, calls and results are text (`toolbox`), results in a row one message."""
    found: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(_text(message["content"]))
            continue
        if results:
            found.append(Message("user", responses(results)))
            results = []
        calls = message.get("tool_calls") or ()
        exact = said.get(calls[0]["id"]) if calls else None
        found.append(Message(message["role"], exact or _text(message.get("content")) + _calls_as_text(calls)))
    if results:
        found.append(Message("user", responses(results)))
    if tools and found:
        told = instructions([tool["function"] for tool in tools])
        found[0] = Message(found[0].role, told + found[0].content)
    return tuple(found)


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if any(part.get("type") != "text" for part in content):
        raise ValueError("a message holds more than text, and this model reads text")
    return "".join(part["text"] for part in content)


def _calls_as_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls that nobody sampled here, such as in few-shot examples."""
    asked = [{"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])} for c in calls]
    return "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in asked)


def _tool_call(text: str, call_id: str) -> dict[str, Any] | None:
    """A call as OpenAI's clients expect it; `None` for what is none, which stays text as with other servers."""
    try:
        asked = json.loads(text)
        function = {"name": asked["name"], "arguments": json.dumps(asked.get("arguments", {}))}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return {"id": call_id, "type": "function", "function": function} if isinstance(asked["name"], str) else None


def _envelope(kind: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": "syncline", "object": kind, "created": 0, "model": "policy", "choices": [choice]}


def _overlong() -> Exception:
    """What they take for a prompt that is too long: the rollout ends there, and is scored."""
    import httpx
    from openai import BadRequestError

    request = httpx.Request("POST", "http://policy")
    words = "the model's maximum context length is reached"
    response: Any = httpx.Response(400, text=words, request=request)  # openai may bring an httpx of its own
    return BadRequestError(words, response=response, body=None)


def _load(env_id: str, env_args: Mapping[str, Any]) -> Any:
    try:
        import verifiers
    except ImportError as error:
        raise ConfigError(["task: verifiers needs `pip install 'syncline[verifiers]'`"]) from error
    if verifiers.__version__ != SUPPORTED:
        raise ConfigError(
            [f"task: verifiers {verifiers.__version__} has another interface than {SUPPORTED}; install that one"]
        )
    with _signals_kept():
        try:
            return verifiers.load_environment(env_id, **env_args)
        except (ValueError, RuntimeError) as error:
            raise ConfigError([f"env_id: {env_id!r} with {dict(env_args)} does not load ({error})"]) from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Their environments take over SIGINT and SIGTERM, which are the worker's."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(["task: verifiers environments can be loaded in the main thread only"])
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _rows(dataset: Any, where: str) -> Source:
    return ((f"{where}:{n}", {"task": "default", **row}) for n, row in enumerate(dataset, start=1))
