"""Every error a user can meet.

SynclineError
├── ConfigError            a value the user gave, with field, value and remedy
├── EngineError            the inference engine answered wrongly, or not at all
│   ├── EngineTimeout      ... not before the deadline
│   └── EngineGone         ... and will not: its process or its host is gone
├── TrajectoryError        the trajectory server answered wrongly, or not at all
├── SyncError              learner and engine could not be proved to hold the same weights
│   └── ParityError        ... their log-probabilities differ by more than the run allows
├── TrainingError          the learner cannot take the next step: a gradient is not finite
├── CheckpointError        a checkpoint is missing, half-written or of another run
└── ProcessDied            a supervised process ended when it should not have
"""

import re


class SynclineError(Exception):
    """Base of all; the command line prints its message without a traceback."""

    exit_code = 1


class ConfigError(SynclineError):
    """A value the user gave cannot be used. `faults` lists every one found, not the first alone."""

    exit_code = 2

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Ranks tell each other of it; what `Exception` would pickle is the text."""
        return ConfigError, (self.faults,)

    def renamed(self, names: dict[str, str]) -> "ConfigError":
        """The same faults in the names the user gave the values: field → option of the program that asked for them."""
        field = rf"(?<![\w.])({'|'.join(map(re.escape, names))})(?!\w|\.\w)"
        return ConfigError([re.sub(field, lambda found: names[found[0]], fault) for fault in self.faults])


class EngineError(SynclineError):
    exit_code = 3


class EngineTimeout(EngineError):
    pass


class EngineGone(EngineError):
    pass


class TrajectoryError(SynclineError):
    exit_code = 4


class SyncError(SynclineError):
    exit_code = 5


class ParityError(SyncError):
    exit_code = 6


class CheckpointError(SynclineError):
    exit_code = 7


class TrainingError(SynclineError):
    exit_code = 9


class ProcessDied(SynclineError):
    exit_code = 8
