"""Load a directory with transformers alone, compare its logits and let it write; run as a script, in its own process.

    python stock_check.py HUB_DIRECTORY EXPECTED.pt

Prints one JSON object. It must not import this package: that is what it is there to show.
"""

from __future__ import annotations

import json
import sys


def main(hub_directory: str, expected_file: str) -> None:
    """Print the class that was loaded, the largest difference of its logits, and whether it writes the same."""
    sys.modules["hf_megatron"] = None  # type: ignore[assignment]  # importing it from here on is an ImportError

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    expected = torch.load(expected_file, weights_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(hub_directory, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(hub_directory)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    continuation = expected["continuation"]
    new_tokens = continuation.shape[1] - expected["prompt"]["input_ids"].shape[1]
    ids = model.double().generate(**expected["prompt"], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    report = {
        "model_class": f"{type(model).__module__}.{type(model).__name__}",
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "max_logit_diff": float((logits - expected["logits"]).abs().max()),
        "largest_logit": float(expected["logits"].abs().max()),
        "same_continuation": torch.equal(ids, continuation),
        "continuation": tokenizer.decode(continuation[0]),
        "stock_continuation": tokenizer.decode(ids[0]),
    }
    print(json.dumps(report))  # noqa: T201 (its output is what the caller reads)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
