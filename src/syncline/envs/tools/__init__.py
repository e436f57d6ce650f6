"""Tools for models: functions with type hints and a docstring (`syncline.envs.toolbox` calls them)."""


class ToolError(ValueError):
    """What the model did wrong with a tool, in words for the model."""
