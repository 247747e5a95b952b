"""The exceptions this package raises for its users' mistakes.

    HfMegatronError(Exception)
    |-- PartitionError(ValueError)            a size or name does not fit the parallel layout
    |-- UnsupportedError(ValueError)          a feature that the parallel models do not have
    |   `-- UnexpectedArgumentError(TypeError)    an argument of a forward that nothing would use
    |-- DataError(ValueError)                 examples or a tokenizer that cannot be trained on
    |-- ParallelStateError(RuntimeError)      process group, world size, use outside of a group
    |   `-- RanksDifferError                  ranks of a group hold, read or do what differs and must be equal
    |-- DivergenceError(FloatingPointError)   a training step that would make the weights inf or nan
    `-- CheckpointError(ValueError)           a checkpoint that cannot be used or written
        |-- CheckpointFormatError             not a format or spelling we know
        |   `-- CheckpointShapeError(RuntimeError)  a tensor does not have the shape its configuration gives it
        |-- CheckpointIncompleteError         a file, a shard or a part of a tensor is missing or extra
        `-- DestinationError                  where we were asked to write is taken or unsafe

Every message gives the numbers and the remedy. Each class also derives from the builtin that fits, so that
``except ValueError`` in existing code keeps working.
"""


class HfMegatronError(Exception):
    """Base of all errors that this package raises on purpose."""


class PartitionError(HfMegatronError, ValueError):
    """A size does not divide, a degree leaves a rank without rows, or a tensor is not in the table."""


class UnsupportedError(HfMegatronError, ValueError):
    """The configuration asks for something the tensor-parallel models do not implement."""


class UnexpectedArgumentError(UnsupportedError, TypeError):
    """A forward was called with an argument that neither it nor its attention kernel uses."""


class DataError(HfMegatronError, ValueError):
    """Examples or a tokenizer cannot be trained on as they are."""


class ParallelStateError(HfMegatronError, RuntimeError):
    """The process group does not fit what was asked for."""


class RanksDifferError(ParallelStateError):
    """Ranks of a tensor-parallel group differ in something that must be equal on all of them."""


class DivergenceError(HfMegatronError, FloatingPointError):
    """A training step's gradients are inf or nan; the step was not taken."""


class CheckpointError(HfMegatronError, ValueError):
    """A checkpoint cannot be read or written."""


class CheckpointFormatError(CheckpointError):
    """The directory is in no known format, or holds names or shapes that its architecture does not have."""


class CheckpointShapeError(CheckpointFormatError, RuntimeError):
    """Tensors do not have the shapes the configuration gives them; transformers has a RuntimeError for it."""


class CheckpointIncompleteError(CheckpointError):
    """Parts of the checkpoint are missing, or parts of another one lie among them."""


class DestinationError(CheckpointError):
    """The destination exists, overlaps the source or cannot be written."""


_MAX_SHOWN = 80


def shown(value: object) -> str:
    """A value from a file, for a message: short, and without characters that do something to a terminal."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]!r}..."
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (int, float, type(None))):
        return repr(value)
    if isinstance(value, (list, tuple)) and len(value) <= 8 and not any(isinstance(v, (list, tuple)) for v in value):
        return f"[{', '.join(map(shown, value))}]"
    return f"a {type(value).__name__}"
