"""Errors meant for people: one line that says what was received, what was expected, what to change."""

from __future__ import annotations

import signal
import zlib
from pathlib import Path

from chatrlhf.errors.redaction import redacted


class UserError(ValueError):
    """Something in the user's files, settings or function is wrong; the command line prints it in one line.

    Credentials in the line are hidden (`redaction.py`).
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(each) if isinstance(each, str) else each for each in args))


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key."""


class MissingError(ConfigError):
    """What a key names is not on this machine, and could not be fetched."""


class DataError(UserError):
    """A data file that cannot be used; the message names file, row and field."""


class UnreachableError(DataError, MissingError):
    """A dataset that could not be read from the hub."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""


class WeightsError(ConfigError, CheckpointError):
    """Weights or adapters that are missing, damaged or of another model; the message names tensors and folder."""


class LockedError(UserError):
    """Another process works in the folder; the message says which."""


class RewardError(UserError):
    """A reward function, model or endpoint that gave something other than one finite number a completion."""


class NonFiniteRewardError(RewardError):
    """A reward gave an infinity or a NaN."""


class RolloutError(UserError):
    """A rollout backend that is gone, or gave something that cannot have been drawn from the distribution."""


class GenerationError(UserError):
    """Text cannot be generated with this model or endpoint, or not any more; the message says what to change."""


class OutsideError(UserError):
    """A file, a disk, memory or another library has failed; its error is the cause.

    ``details`` is the traceback, kept as text because a cause does not travel from process to process; ``run_dir`` the
    folder of the run that failed, where its log is to be, if there is one.
    """

    def __init__(self, line: str, details: str = "") -> None:
        super().__init__(line)
        self.details = details
        self.run_dir: Path | None = None


class FunctionError(OutsideError, RewardError):
    """A user's function has raised; its error is the cause."""


TIME_IS_UP = 255  # beside signals' numbers: the time limit was reached
TIMED_OUT = 124  # exit status, as timeout(1) has it


class Interrupted(BaseException):
    """The run was asked to stop, and did: by a signal, a closed output, a time limit.

    Like KeyboardInterrupt it is no Exception: a library that continues after any Exception would ignore it.

    Args:
        number: the signal's, or TIME_IS_UP.
        then: what can be done now; "" where the one that raises it does not know.
    """

    def __init__(self, number: int, then: str = "") -> None:
        reason = "at the time limit" if number == TIME_IS_UP else f"by {signal.Signals(number).name}"
        super().__init__(f"stopped {reason}{then and '; '}{then}")
        self.number, self.then = number, then

    def or_else(self, then: str) -> Interrupted:
        """This, with what can be done now where it is not known."""
        return self if self.then else Interrupted(self.number, then)

    @property
    def exit_status(self) -> int:
        return TIMED_OUT if self.number == TIME_IS_UP else 128 + self.number


class NotTrainedError(UserError):
    """A stage would start from a model that has not learned what it needs."""


class StoppedByGuardError(UserError):
    """A figure of a run went where the configuration has it end."""


class DivergedError(UserError):
    """The policy's output is not a number any more."""


def one_line(error: Exception, limit: int = 200) -> str:
    """What an error says, on one line; its kind where it says nothing or only a key."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if not text:
        return kind
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    speaks_for_itself = isinstance(error, (OSError, EOFError, ValueError, zlib.error))
    return text if speaks_for_itself else f"{kind}: {text}"
