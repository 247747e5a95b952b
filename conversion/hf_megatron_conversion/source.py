"""Where a checkpoint comes from: a directory, or a repository on the Hub that is downloaded to the local cache."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from hf_megatron.errors import CheckpointFormatError, UnsupportedError

_logger = logging.getLogger(__name__)

_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "SHA256SUMS"]
# "*" matches slashes too.
_WEIGHTS = ["model*.safetensors", "shard-*.safetensors", "*mp_rank_*/model_optim_rng.pt", "*mp_rank_*/model_rng.pt"]
_WEIGHTS += ["*.distcp", "*.metadata", "*common.pt", "*run_config.yaml", "*model.yaml", "*model_config.yaml"]
_WHAT_IT_IS = ["config.json", "latest_checkpointed_iteration.txt", "latest_train_state.pt", "*metadata.json"]
_PICKLED_WEIGHTS = ["pytorch_model*.bin"]


def source_directory(source: str | Path, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The directory of a checkpoint: ``source``, or that of a repository of this name, downloaded.

    With ``config_only`` only what says what a repository holds is fetched. CheckpointFormatError if there is neither
    (or no way to reach it, or no such ``revision``), UnsupportedError for the ``revision`` of a directory.
    """
    directory = Path(source)
    if directory.is_dir():
        if revision is not None:
            raise UnsupportedError(
                f"revision={revision!r} was given, but {source} is a directory; only repositories on the Hub have "
                "revisions."
            )
        return directory
    name = str(source)
    if directory.exists():
        raise CheckpointFormatError(f"{name} is a file; give the directory that holds the checkpoint.")
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointFormatError(f"The directory {name} does not exist.")
    return _download(name, revision, config_only)


def _download(repository: str, revision: str | None, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    download = snapshot_download if revision is None else partial(snapshot_download, revision=revision)

    def fetch(patterns: list[str]) -> Path:
        return Path(download(repository, allow_patterns=patterns))

    try:
        if config_only:
            return fetch(_WHAT_IT_IS)
        directory = fetch(_SIDE_FILES + _WHAT_IT_IS + _WEIGHTS)
        if not any(path for pattern in ("*.safetensors", "mp_rank_*", "*.distcp") for path in directory.rglob(pattern)):
            _logger.info("%s has no safetensors files; fetching its pickled weights.", repository)
            directory = fetch(_SIDE_FILES + _PICKLED_WEIGHTS)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointFormatError(
            f"There is no directory {repository}, and it cannot be fetched from the Hub either: {reason}"
        ) from error
    return directory
