"""Pretrain a GPT-2 from text, in one process or on tensor-parallel ranks, by the Megatron-LM paper's recipe.

    python examples/pretrain_gpt2.py --output gpt2
    torchrun --nproc-per-node 2 examples/pretrain_gpt2.py --output gpt2 --text *.txt --validation held-out.txt
    hf-megatron tokenize web.jsonl web --tokenizer openai-community/gpt2
    torchrun --nproc-per-node 2 examples/pretrain_gpt2.py --output gpt2 --data 0.7 web 0.3 books
    accelerate launch --num_processes 8 examples/pretrain_gpt2.py --output gpt2 --tp 4 --bf16 --preset gpt2-355m \
        --dataset Skylion007/openwebtext --tokenizer openai-community/gpt2 --batch 512 --micro-batch 16 \
        --steps 300000 --learning-rate 1.5e-4

Documents are packed into full sequences with a token after each of them. Adam, weight decay, clipping, the shape of the
learning rate and the initial weights are the paper's; sizes and steps are small ones unless given. The model is cut
over all processes, or with --tp N over groups of N, which then share the batch. However many ranks there are, they
learn the same weights, up to rounding. Texts are held in memory, and token files, Megatron-LM's or those of hf-megatron
tokenize, are not. Without --data, --text or --dataset it learns from the help topics of Python.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from math import exp, gcd
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import GPT2TokenizerFast, PreTrainedTokenizerBase, default_data_collator
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronGPT2Config, MegatronGPT2LMHeadModel, MegatronTrainer
from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.errors import DataError
from hf_megatron.paper.data import PackedDocuments, ShuffledBlend, open_token_files
from hf_megatron.paper.recipe import GPT2_PRETRAINING
from hf_megatron.training.starting import from_first_rank, where_to_start


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 text files, each a document")
    parser.add_argument(
        "--data", nargs="+", metavar="[WEIGHT] PREFIX", help="token files, PREFIX.bin and .idx, or directories of them"
    )
    parser.add_argument("--separate-documents", action="store_true", help="reset attention and positions at their ends")
    parser.add_argument("--dataset", nargs="+", help="data set on the Hub and its configuration; column text of train")
    parser.add_argument("--validation", type=Path, nargs="+", help="UTF-8 text files to measure the perplexity of")
    parser.add_argument("--tokenizer", help="directory or repository of a tokenizer, instead of training one")
    parser.add_argument("--vocab-size", type=int, default=4096, help="largest vocabulary to train")
    parser.add_argument("--preset", help="a model of the paper, such as gpt2-355m, instead of the next four")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4, help="the tensor-parallel degree has to divide it")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
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
    for path in [*(args.text or []), *(args.validation or [])]:
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
        return GPT2TokenizerFast.from_pretrained(args.tokenizer)
    if args.data is not None:
        if found := [name for name in args.data if any(Path(name).glob("tokenizer*.json"))]:
            return GPT2TokenizerFast.from_pretrained(found[0])
        raise DataError(f"None of {', '.join(args.data)} is a directory with a tokenizer; name it with --tokenizer.")
    if is_fresh or not (args.output / "tokenizer_config.json").is_file():
        tokenizer = GPT2TokenizerFast(model_max_length=args.length)
        tokenizer = tokenizer.train_new_from_iterator(texts, args.vocab_size, show_progress=False)
        with AtomicDirectory(args.output) as directory:  # a restart may find it
            tokenizer.save_pretrained(directory.path)
            directory.publish(merge=True)
    return GPT2TokenizerFast.from_pretrained(args.output)


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of each document; one by one, as all of them together may not fit into memory."""
    for text in texts:
        yield tokenizer(text, verbose=False)["input_ids"]  # verbose: a document may be longer than a sequence


def main() -> None:
    """Train the tokenizer and the model, and save both."""
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate
    tp_size = args.tp or world_size
    arguments = GPT2_PRETRAINING.arguments(
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
        train_sampling_strategy="sequential",  # the data are in random order
        eval_strategy="no" if args.validation is None else "steps",
        eval_steps=0.1,  # of all steps
        save_steps=args.save_steps,
        logging_steps=gcd(20, args.save_steps),  # so that a restart, from a checkpoint, logs the same means
        save_total_limit=2,
        ddp_timeout=args.ddp_timeout,
        report_to=args.report_to,
    )
    texts = read_texts(args) if args.data is None else []
    start = where_to_start(args.output, resume=args.resume)
    tokenizer = from_first_rank(lambda: make_tokenizer(texts, args, is_fresh=start is None))
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    if args.preset is None:
        config = MegatronGPT2Config(
            n_embd=args.hidden, n_layer=args.layers, n_head=args.heads, n_positions=args.length, **sizes
        )
    else:
        config = MegatronGPT2Config.from_preset(args.preset, **sizes)
    layout = DistributedConfig(tp_size=tp_size, fsdp_size=world_size // tp_size) if world_size > 1 else None
    model = MegatronGPT2LMHeadModel.from_config(config, distributed_config=layout, seed=args.seed)
    packing = {"length": config.n_positions, "end_of_document": end, "vocab_size": config.vocab_size}
    packing["separate_documents"] = args.separate_documents
    order = {"seed": args.seed, "multiple_of": args.batch}
    if args.data is not None:
        learned = open_token_files(args.data, **order, **packing)
    else:
        learned = ShuffledBlend([PackedDocuments(tokenize(texts, tokenizer), **packing)], **order)
    held_out = None
    if args.validation is not None:
        held_out_texts = (file.read_text(encoding="utf-8") for file in args.validation)
        held_out = PackedDocuments(tokenize(held_out_texts, tokenizer), **packing)
    trainer = MegatronTrainer(
        model,
        arguments,
        train_dataset=learned,
        eval_dataset=held_out,
        data_collator=default_data_collator,  # there is nothing to pad
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    if held_out is not None:
        loss = trainer.evaluate()["eval_loss"]
        if trainer.is_world_process_zero():
            print(f"perplexity of a token of the validation text: {exp(loss):.2f}")


if __name__ == "__main__":
    main()
