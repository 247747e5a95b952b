"""Pretrain a BERT from text, in one process or on tensor-parallel ranks, by the Megatron-LM paper's recipe.

    python examples/pretrain_bert.py --output bert
    torchrun --nproc-per-node 2 examples/pretrain_bert.py --output bert --layernorm-placement post --text book.txt
    accelerate launch --num_processes 8 examples/pretrain_bert.py --output bert --tp 4 --bf16 --preset bert-336m \
        --dataset wikimedia/wikipedia 20231101.en --tokenizer google-bert/bert-base-uncased --length 512 \
        --batch 1024 --micro-batch 32 --steps 2000000 --learning-rate 1e-4

Whole-word n-gram masking and sentence order, Adam, weight decay, clipping, the shape of the learning rate and the
initial weights are the paper's; sizes and steps are small ones unless given. The model is cut over all processes, or
with --tp N over groups of N, which then share the batch. Neither changes which tokens are masked. Without --text or
--dataset it learns from the help topics of Python.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from math import gcd
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining, MegatronTrainer
from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.paper.data import DataCollatorForMegatronBertPretraining, sentence_order_pairs, tokenize_sentences
from hf_megatron.paper.recipe import BERT_PRETRAINING, scale_residual_outputs
from hf_megatron.training.starting import from_first_rank, where_to_start


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 text files, each a document")
    parser.add_argument("--dataset", nargs="+", help="data set on the Hub and its configuration; column text of train")
    parser.add_argument("--tokenizer", help="directory or repository of a tokenizer, instead of training one")
    parser.add_argument("--vocab-size", type=int, default=4096, help="largest vocabulary to train")
    parser.add_argument("--layernorm-placement", choices=["pre", "post"], default="pre")
    parser.add_argument("--preset", help="a model of the paper, such as bert-336m, instead of the next three")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4, help="the tensor-parallel degree has to divide it")
    parser.add_argument("--length", type=int, default=128, help="longest sequence, in tokens")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, help="sequences computed at a time, to save memory")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--save-steps", type=int, default=500, help="steps from one checkpoint to the next")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--keep-activations", action="store_true", help="for the backward pass: more memory, less time")
    parser.add_argument("--tp", type=int, help="tensor-parallel degree; all processes if not given")
    parser.add_argument("--seed", type=int, default=1909)
    parser.add_argument("--report-to", nargs="+", default=[], help="where to log, too: tensorboard or wandb, say")
    parser.add_argument("--ddp-timeout", type=int, default=1800, help="seconds to wait for a rank that hangs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    args = parser.parse_args()
    for path in args.text or []:
        if not path.is_file():
            parser.error(f"there is no file {path}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tp is not None and (args.tp < 1 or world_size % args.tp):
        parser.error(f"--tp {args.tp} does not divide the {world_size} processes.")
    if args.preset is None and (args.hidden % args.heads or args.heads % (args.tp or world_size)):
        parser.error(f"--heads {args.heads} has to divide --hidden {args.hidden}, and the degree --heads.")
    return args


def read_texts(args: argparse.Namespace) -> Iterable[str]:
    """The documents to learn from."""
    if args.dataset is not None:
        column: Iterable[str] = load_dataset(*args.dataset, split="train")["text"]
        return column
    if args.text is not None:
        return [file.read_text(encoding="utf-8") for file in args.text]
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def make_tokenizer(texts: Iterable[str], args: argparse.Namespace, *, is_fresh: bool) -> PreTrainedTokenizerBase:
    """The tokenizer asked for, or that of the run that goes on, or one that is trained on the texts and saved."""
    if args.tokenizer is not None:
        return AutoTokenizer.from_pretrained(args.tokenizer)
    if is_fresh or not (args.output / "tokenizer_config.json").is_file():
        tokenizer = BertTokenizerFast(model_max_length=args.length)
        tokenizer = tokenizer.train_new_from_iterator(texts, args.vocab_size, show_progress=False)
        with AtomicDirectory(args.output) as directory:  # a restart may find it
            tokenizer.save_pretrained(directory.path)
            directory.publish(merge=True)
    return AutoTokenizer.from_pretrained(args.output)


def make_pairs(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """As many sentence-order pairs as there are steps for; the texts are cut and swapped anew each time around.

    The seed makes them the same on all ranks, as tensor parallelism needs them. Each is masked by its own number, at
    any layout and after a restart.
    """
    documents = [tokenize_sentences(tokenizer, text) for text in texts]
    generator = torch.Generator().manual_seed(args.seed)
    pairs: list[dict[str, Any]] = []
    while len(pairs) < args.steps * args.batch:
        cut = list(sentence_order_pairs(documents, tokenizer, max_length=args.length, generator=generator))
        if not cut:
            raise SystemExit("There are no two sentences in the text; give more with --text.")
        pairs += cut
    return [{**pair, "masking_seed": args.seed + number} for number, pair in enumerate(pairs)]


def main() -> None:
    """Train the tokenizer and the model, and save both."""
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate
    tp_size = args.tp or world_size
    arguments = BERT_PRETRAINING.arguments(
        args.output,
        batch=args.batch,
        micro_batch=args.micro_batch,
        data_parallel_size=world_size // tp_size,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        activation_checkpointing=not args.keep_activations,
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        save_steps=args.save_steps,
        logging_steps=gcd(20, args.save_steps),  # so that a restart, from a checkpoint, logs the same means
        save_total_limit=2,
        ddp_timeout=args.ddp_timeout,
        remove_unused_columns=False,  # the collator needs the seeds of masks
        report_to=args.report_to,
    )
    texts = read_texts(args)
    start = where_to_start(args.output, resume=args.resume)
    tokenizer = from_first_rank(lambda: make_tokenizer(texts, args, is_fresh=start is None))
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": args.length,
        "layernorm_placement": args.layernorm_placement,
    }
    if args.preset is None:
        config = MegatronBertConfig(
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden,
            **sizes,
        )
    else:
        config = MegatronBertConfig.from_preset(args.preset, **sizes)
    layout = DistributedConfig(tp_size=tp_size, fsdp_size=world_size // tp_size) if world_size > 1 else None
    model = MegatronBertForPreTraining.from_config(config, distributed_config=layout, seed=args.seed)
    scale_residual_outputs(model)
    trainer = MegatronTrainer(
        model,
        arguments,
        train_dataset=make_pairs(texts, tokenizer, args),
        data_collator=DataCollatorForMegatronBertPretraining(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()


if __name__ == "__main__":
    main()
