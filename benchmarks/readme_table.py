"""README's table of speed, from what was measured.

python -m benchmarks.readme_table           # prints it
python -m benchmarks.readme_table --write   # puts it into README.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_decoding
from benchmarks.peers.derived import ratio_of
from benchmarks.peers.rounds import Spread, paired_ratios
from benchmarks.peers.tables import machine, quartiles, table
from benchmarks.records import RESULTS, read

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(?<=<!-- python -m benchmarks.readme_table --write -->\n).*?(?=<!-- end -->)", re.S)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

_TP2, _TP1 = "ours-tp2-1t", "ours-tp1-2t"
_COMPARED: tuple[tuple[str, str, str, str, str], ...] = (
    # in words, model, ours, the peer, and what of them
    ("GPT-2 step on two ranks, to megatron-core", "gpt2", _TP2, "megatron-core-tp2-1t", "step"),
    ("the same to DTensor's `parallelize_module`, `loss_parallel`", "gpt2", _TP2, "dtensor-tp2-1t", "step"),
    ("its peak memory, imports included, to megatron-core", "gpt2", _TP2, "megatron-core-tp2-1t", "resident"),
    ("BERT step on two ranks, 15% masked, to megatron-core", "bert", _TP2, "megatron-core-tp2-1t", "step"),
    ("the same to transformers' TP with a plan made for it", "bert", _TP2, "transformers-tp-tp2-1t", "step"),
    ("GPT-2 step in one process, to stock transformers", "gpt2", _TP1, "stock-sdpa-tp1-2t", "step"),
    ("GPT-2 on two ranks, to one process with two threads", "gpt2", _TP2, _TP1, "step"),
)


def block(training: Mapping[str, Any], decoding: Mapping[str, Any]) -> str:
    """The table, and what it was measured on.

    Args:
        training: results/training_step.json.
        decoding: results/decoding.json.
    """
    head = ("time or memory, ours / peer: median (quartiles)", *_DTYPES.values())
    environment = next(iter(training.values()))["environment"]
    return f"\n{table(head, _rows(training, decoding))}\n\n{machine(environment)}\n\n"


def _rows(training: Mapping[str, Any], decoding: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for words, model, ours, peer, figure in _COMPARED:
        measured = (training.get(f"{model}-{dtype}") for dtype in _DTYPES)
        yield words, *(_cell(result and ratio_of(result, ours, peer, figure)) for result in measured)
    decoded = (decoding.get(dtype) for dtype in _DTYPES.values())
    yield "greedy decoding on two ranks, to a Llama under transformers' TP", *map(_decoding_cell, decoded)


def _decoding_cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    samples, allowed = result["samples"], result["max_foreign_cores"]
    own, other = samples[bench_decoding.OURS], samples[bench_decoding.PEER]
    return _cell(Spread.of(paired_ratios(own, other, "seconds", allowed)))


def _cell(ratio: Spread | None) -> str:
    if ratio is None:
        return ""
    middle = quartiles(ratio, 2)
    return f"{ratio.median:.2f}" + (f" ({middle})" if middle else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    given = parser.parse_args(arguments)
    text = block(read(RESULTS / "training_step.json"), read(RESULTS / "decoding.json"))
    if given.write:
        written, number = _BLOCK.subn(lambda _: text, README.read_text(encoding="utf-8"))
        if number != 1:
            parser.error(f"{README} has {number} places for the table, lines between which it would stand")
        README.write_text(written, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
