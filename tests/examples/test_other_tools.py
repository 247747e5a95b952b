"""TRL and ONNX with models of this package, where they are installed: they give the numbers of stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_megatron import MegatronTrainer
from tests.models.architectures import ARCHITECTURES, GPT2, ModelCase, StockDir, token_ids

_SKIP = "is not among the dependencies: pip install"


@pytest.fixture(scope="module")
def stock_dir(tmp_path_factory: pytest.TempPathFactory) -> StockDir:
    return StockDir(tmp_path_factory.mktemp("stock"))


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [False, True])
def test_collator_of_trl(stock_dir: StockDir, tmp_path: Path, padding_free: bool) -> None:
    """Catches a field of TRL's batches that our forward refuses, and labels or padding that it reads differently."""
    trl = pytest.importorskip("trl.trainer.sft_trainer", reason=f"TRL {_SKIP} trl")
    examples: list[Any] = [{"input_ids": ids[: 4 + i % 5].tolist()} for i, ids in enumerate(token_ids(8, 9))]
    collator = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    stock = GPT2.load_stock(stock_dir(), dtype=torch.float64)
    _, expected = GPT2.stock_step(stock, collator(examples), use_cache=False)
    options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=8, logging_steps=1, **options)
    model = GPT2.load(stock_dir(), dtype=torch.float64)
    trainer = MegatronTrainer(model, arguments, train_dataset=examples, data_collator=collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the exporter and of torch
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_onnx_gives_stock_logits(stock_dir: StockDir, tmp_path: Path, case: ModelCase) -> None:
    """Catches an operation that ONNX lacks, and a batch, a length or a mask that becomes part of the file."""
    pytest.importorskip("onnxscript", reason=f"onnxscript {_SKIP} onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {_SKIP} onnx onnxscript onnxruntime")
    head = case.language_model
    directory = stock_dir(case, head)
    model, stock = case.load(directory, head=head).eval(), case.load_stock(directory, head).eval()
    model.config.use_cache = False
    ids = token_ids(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    any_size = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (), file, kwargs=batch, dynamo=True, dynamic_shapes=any_size, output_names=["logits"])
    longer = {"input_ids": token_ids(3, 14), "attention_mask": torch.ones(3, 14, dtype=torch.long)}
    longer["attention_mask"][0, 11:] = 0
    (logits,) = runtime.InferenceSession(file).run(["logits"], {name: value.numpy() for name, value in longer.items()})
    is_real = longer["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(logits)[is_real], stock(**longer).logits[is_real], rtol=0, atol=1e-4)
