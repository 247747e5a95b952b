"""What reaches the Hub, with every way to save; the Hub is one that writes down what it is given."""

import fnmatch
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load

from hf_megatron.errors import ParallelStateError
from tests.live import on_live_ranks
from tests.models.architectures import GPT2
from tests.models.reference import Pool, assert_all_equal, full_weights, rank
from tests.training.runs import LAYOUTS, Run, make_trainer, on_ranks

Commit = dict[str, bytes]  # the files of a commit, by their names in the repository


class FakeHub:
    """Takes the place of huggingface_hub's HfApi."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.repositories: list[str] = []
        self.commits: list[Commit] = []

    def _called(self, name: str) -> None:
        if name == self.failing:
            raise ConnectionError("503 from the Hub")

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        self._called("create_repo")
        self.repositories.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> None:
        self._called("create_commit")
        self.commits.append({part.path_in_repo: Path(part.path_or_fileobj).read_bytes() for part in operations})

    def upload_folder(self, folder_path: str, ignore_patterns: Any = (), path_in_repo: str = "", **_: Any) -> Any:
        self._called("upload_folder")
        root = Path(folder_path)
        names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        kept = [n for n in names if not any(fnmatch.fnmatch(n, pattern + "*") for pattern in ignore_patterns or ())]
        self.commits.append({str(PurePosixPath(path_in_repo, name)): (root / name).read_bytes() for name in kept})
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _connect(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> FakeHub:
    hub = FakeHub(failing)
    for module in ("transformers.utils.hub", "transformers.trainer", "hf_megatron.models.uploading"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: hub)
    monkeypatch.setattr(
        "hf_megatron.models.uploading.create_and_tag_model_card", lambda *_, **__: ModelCard("# A model")
    )
    return hub


def _save(source: Path, directory: Path, options: dict[str, Any], tp_size: int) -> tuple[list[str], list[Commit]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub = _connect(monkeypatch)
        model = GPT2.load(source, tp_size)
        model.save_pretrained(directory, push_to_hub=True, **options)
        if tp_size > 1 and "repo_id" in options:
            model.push_to_hub("me/again", commit_message="a message", private=True)
        return hub.repositories, hub.commits


@pytest.mark.parametrize(
    ("tp_size", "options", "repository", "weights"),
    [
        (1, {}, "my-model", ["model.safetensors"]),
        (1, {"stock": True}, "my-model", ["model.safetensors"]),
        (2, {"repo_id": "me/other", "private": True, "token": "secret"}, "me/other", ["model.safetensors"]),
        (2, {"distributed_checkpoint": True}, "my-model", None),
    ],
)
def test_what_is_saved_is_pushed(
    pool: Pool, gpt2: Path, tmp_path: Path, tp_size: int, options: dict[str, Any], repository: str, weights: Any
) -> None:
    """Catches a repository with the name of a hidden directory, a config that is not there yet, and rank 1 pushing."""
    directory = tmp_path / "my-model"
    if not options.get("distributed_checkpoint"):
        (directory / "checkpoint-3").mkdir(parents=True)
        (directory / "checkpoint-3" / "old").write_text("of an earlier run")
    if tp_size == 1:
        repositories, (commit,) = _save(gpt2, directory, options, 1)
    else:
        (repositories, (commit, *again)), others = pool(2).run(_save, gpt2, directory, options, tp_size)
        assert others == ([], [])
        assert repositories[1:] == ["me/again"] * len(again)
        assert all(pushed["model.safetensors"] == commit["model.safetensors"] for pushed in again)
    assert repositories[0] == repository
    for name, content in commit.items():
        assert content == (directory / name).read_bytes(), name
    expected = weights or sorted(path.name for path in directory.glob("*.safetensors"))
    assert sorted(name for name in commit if name.endswith(".safetensors")) == expected
    assert {"config.json", "README.md"} <= set(commit)
    assert (b'"model_type": "gpt2"' in commit["config.json"]) == bool(options.get("stock"))


@pytest.mark.parametrize("failing", ["create_repo", "create_commit"])
@on_live_ranks(2)
def test_a_hub_that_fails_is_an_error_on_all_ranks(gpt2: Path, tmp_path: Path, failing: str) -> None:
    """Catches ranks that wait for the first one, whose upload failed."""
    error, told = (ConnectionError, "") if rank() == 0 else (ParallelStateError, "rank 0 failed: ConnectionError: ")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _connect(monkeypatch, failing if rank() == 0 else "")
        model = GPT2.load(gpt2, 2)
        with pytest.raises(error, match=f"^{told}503 from the Hub$"):
            model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert (tmp_path / "model").exists() == (failing == "create_commit")


def _train(run: Run, failing: str) -> tuple[list[Commit], dict[str, torch.Tensor], str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub = _connect(monkeypatch)
        trainer = make_trainer(run)
        hub.failing = failing if rank() == 0 else ""
        try:
            trainer.train()
            if run.arguments["hub_strategy"] == "end":
                trainer.push_to_hub()
        except (ConnectionError, ParallelStateError) as error:
            return hub.commits, {}, f"{type(error).__name__}: {error}"
        return hub.commits, full_weights(trainer.model), ""


@pytest.mark.parametrize("layout", ["one", "tp2"])
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_every_strategy_pushes_the_weights(pool: Pool, gpt2: Path, tmp_path: Path, strategy: str, layout: str) -> None:
    """Catches a run of days whose repository has no weights until the end."""
    arguments = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/run", "save_steps": 3}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS.get(layout, {}), arguments=arguments)
    commits, weights, error = on_ranks(pool, _train, run, "")
    assert error == ""
    assert len(commits) == {"every_save": 2, "end": 1}.get(strategy, 4)
    whole = [commit for commit in commits if "model.safetensors" in commit]
    assert len(whole) == (1 if strategy == "end" else 2)
    stored = load(whole[-1]["model.safetensors"])
    assert_all_equal({name: weights[name] for name in stored}, stored)
    if strategy in ("checkpoint", "all_checkpoints"):
        folders = ["last-checkpoint"] * 2 if strategy == "checkpoint" else ["checkpoint-3", "checkpoint-6"]
        for folder, commit in zip(folders, commits[1::2], strict=True):
            assert {f"{folder}/trainer_state.json", f"{folder}/config.json"} <= set(commit)


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_an_upload_that_fails_ends_the_run_on_all_ranks(pool: Pool, gpt2: Path, tmp_path: Path, strategy: str) -> None:
    """Catches ranks that wait for the first one, whose upload failed."""
    arguments = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/run"}
    run = Run(gpt2, tmp_path / "run", layout=LAYOUTS["tp2"], arguments=arguments)
    (_, _, first), (_, _, second) = pool(2).run(_train, run, "upload_folder", timeout=120)
    assert first == "ConnectionError: 503 from the Hub"
    assert second == "ParallelStateError: rank 0 failed: ConnectionError: 503 from the Hub"
