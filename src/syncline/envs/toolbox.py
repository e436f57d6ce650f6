"""Tools a model may call before it answers: plain functions with type hints and a docstring, called in its text.

A call is `<tool_call>{"name": "calculator", "arguments": {"expression": "2+2"}}</tool_call>` (the format Hermes and
Qwen models were taught), its result comes back in `<tool_response>`; both are ordinary messages, so every chat template
takes them, and a model without one too. A `ToolError` is told to the model; anything else that a tool raises is the
environment's fault, and the attempt's status is `ERROR`.
"""

import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from syncline.envs.conversation import Conversation, Messages, converse
from syncline.envs.imports import imported
from syncline.envs.tools import ToolError
from syncline.envs.tools.calculator import calculator
from syncline.envs.tools.python_sandbox import PythonSandbox
from syncline.errors import ConfigError
from syncline.protocols import Policy
from syncline.types import Message

Tool = Callable[..., str | Awaitable[str]]
MAX_CALLS = 8
"""Calls of one answer that are carried out."""
MAX_RESULT_CHARS = 8000
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_INSTRUCTIONS = """You may call these tools, each described by a JSON schema:
<tools>
{tools}
</tools>
To call one, write <tool_call>{{"name": "...", "arguments": {{...}}}}</tool_call> and end your turn; its result comes \
in <tool_response>. An answer without a call is your final one.

"""


class Toolbox:
    """The tools of an environment, and how many answers a conversation with them may have."""

    def __init__(self, tools: Sequence[Tool], *, max_turns: int = 4) -> None:
        if max_turns < 2:
            raise ConfigError([f"max_turns: {max_turns} leaves no turn to use a tool's result; give 2 or more"])
        schemas = [_schema(tool) for tool in tools]
        self._tools: Mapping[str, Tool] = {s["name"]: tool for s, tool in zip(schemas, tools, strict=True)}
        self._takes = {s["name"]: get_type_hints(tool) for s, tool in zip(schemas, tools, strict=True)}
        self._max_turns = max_turns
        self._instructions = instructions(schemas)

    async def converse(self, policy: Policy, messages: Sequence[Message], num_attempts: int) -> list[Conversation]:
        """The attempts at a prompt whose first message also says which tools there are."""
        first, *rest = messages
        told = (replace(first, content=self._instructions + first.content), *rest)
        return await converse(policy, told, num_attempts, reply=self._reply, max_turns=self._max_turns)

    async def _reply(self, messages: Messages) -> Sequence[Message]:
        results = [await self._call(call) for call in CALL.findall(messages[-1].content)[:MAX_CALLS]]
        return (Message("user", responses(results)),) if results else ()

    async def _call(self, call: str) -> str:
        try:
            tool, arguments = self._parsed(call)
            result = tool(**arguments)
            return str(await result if inspect.isawaitable(result) else result)
        except ToolError as error:
            return f"Error: {error}"

    def _parsed(self, call: str) -> tuple[Tool, dict[str, Any]]:
        try:
            asked = json.loads(call)
        except (ValueError, RecursionError) as error:
            raise ToolError(f"a call must be one JSON object ({error})") from error
        if not isinstance(asked, dict) or not isinstance(asked.get("arguments", {}), dict):
            raise ToolError('a call must look like {"name": "...", "arguments": {...}}')
        name, arguments = str(asked.get("name")), asked.get("arguments", {})
        if name not in self._tools:
            raise ToolError(f"there is no tool {name!r}; there are: {', '.join(self._tools)}")
        try:
            inspect.signature(self._tools[name]).bind(**arguments)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from error
        return self._tools[name], {given: self._typed(name, given, value) for given, value in arguments.items()}

    def _typed(self, name: str, argument: str, value: Any) -> Any:
        try:
            return TypeAdapter(self._takes[name].get(argument, Any)).validate_python(value)
        except ValidationError as error:
            raise ToolError(f"{name}: {argument} = {value!r}: {error.errors()[0]['msg']}") from error


def instructions(schemas: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told about its tools, before anything else."""
    return _INSTRUCTIONS.format(tools="\n".join(json.dumps(schema) for schema in schemas))


def responses(results: Sequence[str]) -> str:
    """The results of an answer's calls, in order, as one message."""
    return "\n".join(f"<tool_response>\n{result[:MAX_RESULT_CHARS]}\n</tool_response>" for result in results)


def build_toolbox(names: Sequence[str], *, max_turns: int, sandbox: Mapping[str, Any] | None = None) -> Toolbox | None:
    """The toolbox a configuration names: `calculator`, `python`, import paths of functions; no names, no toolbox.

    `sandbox` are the limits of `python`. Raises `ConfigError`.
    """
    if sandbox and "python" not in names:
        raise ConfigError(
            [f"sandbox: {dict(sandbox)} limits the tool `python`, which tools = {list(names)} leaves out"]
        )
    return Toolbox([_tool(name, sandbox or {}) for name in names], max_turns=max_turns) if names else None


def _tool(name: str, sandbox: Mapping[str, Any]) -> Tool:
    if name == "calculator":
        return calculator
    if name == "python":
        return PythonSandbox.from_config(sandbox).python
    return imported(name, field="tools")


def _schema(tool: Tool) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import DocstringParsingException as NoDocstring
    from transformers.utils.chat_template_utils import TypeHintParsingException as NoTypeHint
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(tool)["function"]
    except (NoDocstring, NoTypeHint) as error:
        raise ConfigError([f"tools: {error}"]) from error
