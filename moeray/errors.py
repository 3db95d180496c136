"""Every error that moeray raises on purpose. Each message is one line: what is wrong, by name, and how to mend it."""


class MoerayError(Exception):
    """Base of all of moeray's own errors."""


def one_line(error: BaseException) -> str:
    """An error's words without line breaks."""
    return " ".join(str(error).split())


def in_a_line(error: Exception) -> str:
    """What another library's error says, for the end of a message of ours; its kind where that says little."""
    text = one_line(error)[:200]
    return text if " " in text and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


class ConfigError(MoerayError, ValueError):
    """A config key or value is wrong."""


class CheckpointError(MoerayError):
    """A checkpoint file or tensor is missing, truncated or of the wrong shape."""


class UnsupportedModelError(MoerayError):
    """The model family needs something that moeray does not have; the message says what."""


class PlacementError(MoerayError):
    """Experts do not fit on the actors or nodes that are there."""


class NoReplicaError(PlacementError):
    """An expert's rows found no replica that answers, in a layer that began at `since` (time.monotonic)."""

    def __init__(self, message: str, *, since: float) -> None:
        super().__init__(message)
        self.since = since


class WireError(MoerayError):
    """Bytes on a channel were not a frame of ours, or passed a limit."""


class AuthenticationError(WireError):
    """The peer does not hold the cluster token, or serves another model."""


class ChannelClosedError(WireError):
    """The peer is gone; nothing more will come on this channel."""


class ChannelTimeoutError(WireError):
    """Nothing came within the deadline; the channel is still open."""


class RequestError(MoerayError, ValueError):
    """A request cannot be served as asked; `param` names the field at fault.

    `code` is an OpenAI error code such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(MoerayError):
    """The router's waiting queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ActorLostError(MoerayError):
    """The actor that was asked is gone."""


class NotReadyError(MoerayError):
    """The system is not there yet, or no longer; another attempt may find it."""


class RouterLostError(MoerayError):
    """The router that held the request is gone and no other took it over."""


class PolicyError(MoerayError):
    """A scaling policy raised an error, or gave what is no wish; the message names it."""


class TraceError(MoerayError, ValueError):
    """A request trace cannot be read, or has nothing in it; the message names the file and line."""


class SimulationError(MoerayError):
    """A simulation cannot answer as asked: its cost file is wrong, or no number of actors meets the SLO."""


class SystemAbsentError(MoerayError):
    """No system of that name runs in the Ray cluster."""


class BatchError(MoerayError, ValueError):
    """A batch job's files cannot be used as they are; the message names the file, and the line where there is one."""


class BatchPausedError(MoerayError):
    """A batch job cannot go on now, and may later: every line is either written or will be asked by the next run."""
