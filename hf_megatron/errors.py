"""The exceptions this package raises for its users' mistakes.

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
