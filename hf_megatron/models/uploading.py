"""Uploads to the Hub, after a directory has its final name and config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.hub import create_and_tag_model_card, hf_api

from hf_megatron.models.processes import share_failure

# Arguments of the stock methods for the repository and for the commit.
_REPOSITORY = ("private", "repo_type", "resource_group_id")
_COMMIT = ("commit_message", "commit_description", "create_pr", "revision")


class Upload:
    """Upload for ``save_pretrained(push_to_hub=True)``; every rank of a collective save creates one.

    Only what is written to the directory from now on is uploaded: a run's checkpoints may lie there. The upload's
    ``arguments`` of ``save_pretrained`` are taken out of these. If all ranks take part (``is_collective``), a failure
    of the writer is a ParallelStateError on all.
    """

    def __init__(
        self, model: Any, directory: Path, arguments: dict[str, Any], *, is_collective: bool, is_writer: bool
    ) -> None:
        self._model, self._directory, self._is_collective = model, directory, is_collective
        self._is_writer = is_writer
        del arguments["push_to_hub"]
        self._repo_id = arguments.pop("repo_id", directory.name)
        self._commit = {name: arguments.pop(name) for name in _COMMIT if name in arguments}
        options = {name: arguments.pop(name) for name in _REPOSITORY if name in arguments}
        self._token = arguments.get("token")
        self._before: dict[str, float] = {}
        self._settle(lambda: self._create(options))

    def _create(self, options: dict[str, Any]) -> None:
        self._repo_id = hf_api().create_repo(self._repo_id, exist_ok=True, token=self._token, **options).repo_id
        if self._directory.is_dir():
            self._before = self._model._get_files_timestamps(self._directory)

    def run(self) -> None:
        """Upload the saved files; ParallelStateError if the writer could not."""
        self._settle(self._upload)

    def _upload(self) -> None:
        card = create_and_tag_model_card(self._repo_id, self._model.model_tags, token=self._token)
        card.save(self._directory / "README.md")
        self._model._upload_modified_files(
            self._directory, self._repo_id, self._before, token=self._token, **self._commit
        )

    def _settle(self, action: Callable[[], None]) -> None:
        error = None
        try:
            if self._is_writer:
                action()
        except Exception as caught:
            error = caught
        if self._is_collective:
            share_failure(error)
        elif error is not None:
            raise error
