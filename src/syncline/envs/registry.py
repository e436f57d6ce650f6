"""From a config's `environments.N` to an instance: a built-in by name, or a user's own by import path."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from syncline.config.schema import Environment as EnvironmentConfig
from syncline.errors import ConfigError
from syncline.protocols import Environment

BUILT_IN = {
    "arithmetic": "syncline.envs.tasks.arithmetic:Arithmetic",
    "gsm8k": "syncline.envs.tasks.gsm8k:Gsm8k",
    "judged": "syncline.envs.tasks.judged:Judged",
    "reasoning_gym": "syncline.envs.adapters.reasoning_gym:ReasoningGym",
    "summary": "syncline.envs.tasks.summary:Summary",
    "thermal_storage": "syncline.envs.tasks.thermal_storage:ThermalStorage",
    "trl_rewards": "syncline.envs.adapters.trl_rewards:TrlRewards",
    "verifiers": "syncline.envs.adapters.verifiers:Verifiers",
}
_METHODS = ("task", "rollouts")


def build_environment(config: EnvironmentConfig, *, position: int, seed: int) -> Environment:
    """The environment at `environments.<position>`. Raises `ConfigError` naming the field, the value and a remedy.

    `seed` (the run's) is passed on to a constructor that takes one and was not given another in `args`.
    """
    field = f"environments.{position}"
    build = _constructor(config.task, field=f"{field}.task")
    args = {"seed": seed, **config.args} if _takes_seed(build) else config.args
    try:
        _check_args(build, args, field=f"{field}.args")
        environment = build(**args)
    except ConfigError as error:
        raise ConfigError([_placed(fault, field) for fault in error.faults]) from error
    except (TypeError, ValueError, AttributeError) as error:
        if config.task not in BUILT_IN:  # the user's own bug, with its traceback
            raise
        raise ConfigError([f"{field}.args: {args} are not of the types that it takes: {error}"]) from error
    _check_environment(environment, task=config.task, field=f"{field}.task")
    return environment


def _constructor(task: str, *, field: str) -> Callable[..., Any]:
    path = BUILT_IN.get(task, task)
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(
            [
                f"{field}: {task!r} is not a built-in ({', '.join(BUILT_IN)}); "
                "use one of these, or an import path such as my_package.my_module:MyEnvironment"
            ]
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        remedy = "install what it needs or put its folder on PYTHONPATH"
        raise ConfigError([f"{field}: {task!r}: module {module_name!r} does not import ({error}); {remedy}"]) from error
    build = getattr(module, attribute, None)
    if not callable(build):
        raise ConfigError([f"{field}: {task!r}: module {module_name!r} has no class {attribute!r}; correct the name"])
    if missing := sorted(getattr(build, "__abstractmethods__", ())):
        raise ConfigError([f"{field}: {task!r} does not define {', '.join(missing)}; write what is missing"])
    return build


def _takes_seed(build: Callable[..., Any]) -> bool:
    return "seed" in inspect.signature(build).parameters


def _check_args(build: Callable[..., Any], args: Mapping[str, Any], *, field: str) -> None:
    """Beforehand, so that a `TypeError` from inside the constructor is not taken for the user's."""
    signature = inspect.signature(build)
    try:
        signature.bind(**args)
    except TypeError as error:
        accepted = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise ConfigError(
            [f"{field}: {dict(args)} does not fit the constructor: {error}; it takes ({accepted})"]
        ) from error


def _check_environment(environment: Any, *, task: str, field: str) -> None:
    lacking = [f"{name}()" for name in _METHODS if not callable(getattr(environment, name, None))]
    if not isinstance(getattr(environment, "name", None), str):
        lacking.insert(0, "a str `name`")
    if lacking:
        raise ConfigError(
            [
                f"{field}: {task!r} is not an Environment: {type(environment).__name__} lacks {', '.join(lacking)}; "
                "subclass syncline.envs.single_turn.SingleTurn, or see syncline.protocols.Environment"
            ]
        )
    if not inspect.iscoroutinefunction(environment.rollouts):
        raise ConfigError([f"{field}: {task!r}: rollouts() is not a coroutine; define it with `async def`"])


def _placed(fault: str, field: str) -> str:
    return fault if fault.startswith(field) else f"{field}.args.{fault}"
