"""Models whose weights wait on the host or on disk, or lie on several devices: accelerate's hooks bring them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from tests.models.architectures import ARCHITECTURES, BERTS, GPT2, H, ModelCase, StockDir, token_ids
from tests.models.reference import outputs_of

_MODELS = [*((case, case.language_model) for case in ARCHITECTURES), (GPT2, "ForSequenceClassification")]
_MODELS += [(BERTS[0], "ForPreTraining")]


WAYS: dict[str, Callable[..., Any]] = {
    "cpu_offload": lambda load, folder: accelerate.cpu_offload(load(), execution_device="cpu"),
    "disk_offload": lambda load, folder: accelerate.disk_offload(load(), folder, execution_device="cpu"),
    "device_map cpu": lambda load, folder: load(device_map={"": "cpu"}, offload_folder=folder),
    "device_map disk": lambda load, folder: load(device_map={"": "disk"}, offload_folder=folder),
    "device_map auto": lambda load, folder: load(device_map="auto", offload_folder=folder),
}
GPU_WAYS: dict[str, Callable[..., Any]] = {
    "cpu_offload": lambda load, folder: accelerate.cpu_offload(load(), execution_device=0),
    "device_map auto": WAYS["device_map auto"],
    "little memory": lambda load, folder: load(
        device_map="auto", max_memory={0: "150KB", "cpu": "1GB"}, offload_folder=folder
    ),
    "half a GPU": lambda load, folder: load(
        device_map="auto", max_memory={0: "150KB", 1: "1GB", "cpu": "1GB"}, offload_folder=folder
    ),
}


def _compare(case: ModelCase, head: str, directory: Path, folder: Path, way: Callable[..., Any]) -> None:
    stock = case.load_stock(directory, head)
    batch = case.batch(head)
    expected, loss = case.stock_step(stock, batch)
    made = way(lambda **options: case.load(directory, head=head, **options), folder / "evaluation")
    with torch.no_grad():
        outputs = made.eval()(**batch)
    valid = torch.ones_like(batch["attention_mask"]).bool()
    for (name, actual), (_, wanted) in zip(outputs_of(outputs, valid), outputs_of(expected, valid), strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-5, atol=1e-5, msg=name)
    made = way(lambda **options: case.load(directory, head=head, **options), folder / "training")
    trained = made.train()(**batch).loss
    trained.backward()
    torch.testing.assert_close(trained.cpu(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "head"), _MODELS)
def test_weights_that_wait_elsewhere_give_stocks_numbers(
    stock_dir: StockDir, tmp_path: Path, case: ModelCase, head: str, way: str, variant: str
) -> None:
    """Catches weights that are read where no hook has brought them: NaN, or numbers of empty memory."""
    _compare(case, head, stock_dir(case, head, variant), tmp_path, WAYS[way])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["base", "untied"])
@pytest.mark.parametrize("way", GPU_WAYS)
@pytest.mark.parametrize(("case", "head"), _MODELS)
def test_on_gpus(stock_dir: StockDir, tmp_path: Path, case: ModelCase, head: str, way: str, variant: str) -> None:
    """Catches a head that copies the embedding from another GPU, or meets its hidden states on the wrong one."""
    if way == "half a GPU" and torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    _compare(case, head, stock_dir(case, head, variant), tmp_path, GPU_WAYS[way])


def test_a_tied_head_asks_the_embedding_for_its_weight(stock_dir: StockDir) -> None:
    """Catches a head that holds on to the weight, or is handed it as a tensor, which a hook would copy every time."""
    model = accelerate.cpu_offload(GPT2.load(stock_dir()), execution_device="cpu")
    given: list[Any] = []
    model.lm_head.register_forward_pre_hook(
        lambda module, args, kwargs: given.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    model(input_ids=token_ids(2, 9))
    sizes = [value.numel() for value in given if isinstance(value, torch.Tensor)]
    assert sizes == [2 * 9 * H]
    assert model.transformer.wte.weight.is_meta
