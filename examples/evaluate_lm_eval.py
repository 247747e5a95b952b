"""Evaluate a GPT-2 with lm-evaluation-harness, in one process or, under torchrun, on tensor-parallel ranks.

    pip install lm-eval
    python examples/evaluate_lm_eval.py MODEL --tasks lambada_openai,wikitext
    torchrun --nproc-per-node 2 examples/evaluate_lm_eval.py MODEL --tasks lambada_openai,wikitext

MODEL is a directory or a repository on the Hub. Tasks of your own are YAML files in ``--include-path``. ``--stock``
takes the classes of transformers instead, in one process. The harness's own command line cannot do this on several
ranks: it gives each rank a part of the requests, while the ranks of a tensor-parallel group work on each one together.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import lm_eval
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2LMHeadModel


def main() -> None:
    """Parse the command line, load, evaluate, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="directory or repository on the Hub")
    parser.add_argument("--tasks", required=True, help="names of tasks, separated by commas")
    parser.add_argument("--include-path", help="directory with tasks of your own")
    parser.add_argument("--limit", type=int, help="number of examples of each task; all by default")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--bootstrap", type=int, default=100, help="samples for errors; 0 for none")
    parser.add_argument("--dtype", default="auto", help="auto: as the checkpoint is stored")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    parser.add_argument("--stock", action="store_true", help="take transformers' own GPT-2")
    args = parser.parse_args()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.stock and num_ranks > 1:
        parser.error("--stock: transformers' GPT-2 cannot be split over ranks; start one process.")

    if args.stock:
        model = GPT2LMHeadModel.from_pretrained(args.model, dtype=args.dtype)
    else:
        layout = DistributedConfig(tp_size=num_ranks) if num_ranks > 1 else None
        model = MegatronGPT2LMHeadModel.from_pretrained(args.model, dtype=args.dtype, distributed_config=layout)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # A model that is loaded already: every rank then sees every request, in the same order.
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    tasks = TaskManager(include_path=args.include_path)
    names = args.tasks.split(",")
    results = lm_eval.simple_evaluate(
        harness, tasks=names, task_manager=tasks, limit=args.limit, bootstrap_iters=args.bootstrap
    )
    if results is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        print(make_table(results))
        if args.output is not None:
            args.output.write_text(json.dumps(results["results"], indent=1, sort_keys=True), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
