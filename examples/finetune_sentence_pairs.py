"""Fine-tune a BERT to classify pairs of sentences (MNLI, QQP), with the Megatron-LM paper's hyper-parameters.

    python examples/finetune_sentence_pairs.py mnli --model bert --output mnli \
        --train MNLI/train.tsv --validation MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv
    torchrun --nproc-per-node 2 examples/finetune_sentence_pairs.py qqp --model bert --output qqp
    accelerate launch --num_processes 4 examples/finetune_sentence_pairs.py qqp --model bert --tp 2 --output qqp

The model is cut over all processes; with --tp N over groups of N, which then share the batch. Without --train the data
comes from the Hub. Left in --output: the model and its accuracy on each validation set.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import evaluate
import torch
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronBertForSequenceClassification, MegatronTrainer
from hf_megatron.paper.data import PAIR_TASKS, SentencePair, read_sentence_pairs, sentence_pairs_from_hub
from hf_megatron.paper.metrics import metric_path
from hf_megatron.paper.recipe import finetuning_recipe
from hf_megatron.training.starting import where_to_start

HUB = "nyu-mll/glue"
HUB_VALIDATION = {"mnli": ("validation_matched", "validation_mismatched"), "qqp": ("validation",)}


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=list(PAIR_TASKS))
    parser.add_argument("--model", required=True, help="directory or repository of a BERT and its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--train", type=Path, help="official file, such as MNLI/train.tsv or multinli_1.0_train.jsonl")
    parser.add_argument("--validation", type=Path, nargs="+", help="one official file or more")
    parser.add_argument("--size", choices=["336m", "1.3b", "3.9b"], default="336m", help="column of table 6")
    parser.add_argument("--batch", type=int, help="pairs of a step, in place of table 6's")
    parser.add_argument("--micro-batch", type=int, help="pairs computed at a time, to save memory")
    parser.add_argument("--learning-rate", type=float, help="in place of table 6's")
    parser.add_argument("--epochs", type=float, help="in place of table 6's")
    parser.add_argument("--length", type=int, default=128, help="longest pair, in tokens")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--keep-activations", action="store_true", help="for the backward pass: more memory, less time")
    parser.add_argument("--tp", type=int, help="tensor-parallel degree; all processes if not given")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    args = parser.parse_args()
    if (args.train is None) != (args.validation is None):
        parser.error("--train and --validation go together; without both the data comes from the Hub.")
    for path in [args.train, *args.validation] if args.train is not None else []:
        if not path.exists():
            parser.error(f"there is no {path}.")
    positions = AutoConfig.from_pretrained(args.model).max_position_embeddings
    if args.length > positions:
        parser.error(f"--length {args.length} is more than the model's {positions} positions.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tp is not None and (args.tp < 1 or world_size % args.tp):
        parser.error(f"--tp {args.tp} does not divide the {world_size} processes.")
    return args


def read_pairs(args: argparse.Namespace) -> tuple[list[SentencePair], dict[str, list[SentencePair]]]:
    """The pairs to learn from, and those to be tested on by name of the set."""
    task = PAIR_TASKS[args.task]
    if args.train is not None:
        validation = {file.stem: read_sentence_pairs(task, file) for file in args.validation}
        return read_sentence_pairs(task, args.train), validation
    splits = load_dataset(HUB, args.task)
    pairs = {name: sentence_pairs_from_hub(task, splits[name]) for name in ("train", *HUB_VALIDATION[args.task])}
    return pairs.pop("train"), pairs


def encode(pairs: list[SentencePair], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """A data set of token ids; of a pair that is too long the end of the longer sentence is cut off."""
    return Dataset.from_list(pairs).map(
        lambda batch: tokenizer(batch["first"], batch["second"], truncation=True, max_length=length),
        batched=True,
        remove_columns=["first", "second"],
    )


def main() -> None:
    """Fine-tune, classify, measure and save."""
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate
    tp_size = args.tp or world_size
    changes = {"learning_rate": args.learning_rate, "num_train_epochs": args.epochs}
    arguments = finetuning_recipe(args.task, args.size).arguments(
        args.output,
        batch=args.batch,
        micro_batch=args.micro_batch,
        data_parallel_size=world_size // tp_size,
        bf16=args.bf16,
        activation_checkpointing=not args.keep_activations,
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="epoch",
        logging_steps=10,
        report_to=[],
        **{name: value for name, value in changes.items() if value is not None},
    )
    start = where_to_start(args.output, resume=args.resume)
    layout = DistributedConfig(tp_size=tp_size, fsdp_size=world_size // tp_size) if world_size > 1 else None
    set_seed(args.seed)  # what the new head is drawn from
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    labels = PAIR_TASKS[args.task].labels
    model = MegatronBertForSequenceClassification.from_pretrained(
        args.model,
        distributed_config=layout,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    train, validation = read_pairs(args)
    trainer = MegatronTrainer(
        model,
        arguments,
        train_dataset=encode(train, tokenizer, args.length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train(resume_from_checkpoint=start)
    metric = evaluate.load(metric_path("accuracy"), keep_in_memory=True)
    scores = {}
    for name, pairs in validation.items():
        output = trainer.predict(encode(pairs, tokenizer, args.length))
        scores[name] = metric.compute(predictions=output.predictions.argmax(axis=-1), references=output.label_ids)
    trainer.save_model()
    if trainer.is_world_process_zero():
        (args.output / "metrics.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
        for name, values in scores.items():
            print(f"{name} accuracy {values['accuracy']:.4f}")


if __name__ == "__main__":
    main()
