"""torch.export of the models in one process: the exported program gives the logits of stock transformers."""

import pytest
import torch
from torch.export import Dim

from tests.models.architectures import ARCHITECTURES, ModelCase, StockDir, token_ids


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_exported_model_gives_stock_logits(stock_dir: StockDir, case: ModelCase) -> None:
    """Catches a forward that cannot be traced, and a batch, a length or a mask that becomes part of the program."""
    directory = stock_dir(case, case.language_model)
    stock = case.load_stock(directory, case.language_model, dtype=torch.float64).eval()
    model = case.load(directory, head=case.language_model, dtype=torch.float64).eval()
    model.config.use_cache = False  # a cache is no output that can be exported
    example = case.inputs(case.language_model, "right")
    example.pop("token_type_ids", None)
    program = torch.export.export(
        model, (), example, dynamic_shapes={name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in example}
    )
    longer = {"input_ids": token_ids(2, 14), "attention_mask": torch.ones(2, 14, dtype=torch.long)}
    longer["attention_mask"][0, 11:] = 0
    for batch in (example, longer):
        is_real = batch["attention_mask"].bool()
        found, expected = program.module()(**batch).logits, stock(**batch).logits
        torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-11)
