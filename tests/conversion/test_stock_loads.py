"""What leaves by `--to hub` is at home in transformers without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hf_megatron_conversion import convert
from tests.conversion.checkpoints import there_and_back

# In a process that ignores PYTHONPATH and the current directory, and refuses to import this package besides.
_LOAD = """
import json, sys
sys.modules["hf_megatron"] = sys.modules["hf_megatron_conversion"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(20).unsqueeze(0)
report = []
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    keys = [sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    report.append([type(model).__name__, keys, model(ids).logits.double().sum().item()])
print(json.dumps(report))
"""


def test_stock_transformers_loads_hub_directories(tied: Path, untied: Path, tmp_path: Path) -> None:
    """Catches names, config entries or metadata that only our classes understand."""
    paths = []
    for source in (tied, untied):
        tp, _ = there_and_back(source, tmp_path / f"from-{source.name}", 4)
        convert(tp, tmp_path / source.name, to="hub", max_shard_size="100KB")
        paths += [str(source), str(tmp_path / source.name)]
    report = json.loads(subprocess.check_output([sys.executable, "-I", "-c", _LOAD, *paths], text=True))
    for original, converted in zip(report[::2], report[1::2], strict=True):
        assert converted == original
        assert converted[:2] == ["GPT2LMHeadModel", [[], [], []]]
