"""Fine-tune a BERT to choose among four answers (RACE), with the Megatron-LM paper's hyper-parameters.

    python examples/finetune_race.py --model bert --train RACE/train --validation RACE/dev RACE/test --output race
    torchrun --nproc-per-node 2 examples/finetune_race.py --model bert --output race
    accelerate launch --num_processes 4 examples/finetune_race.py --model bert --tp 2 --output race

The model is cut over all processes; with --tp N over groups of N, which then share the batch. Without --train the data
comes from the Hub. Left in --output: the model and its accuracy, over all questions and by level.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import evaluate
import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoTokenizer, DataCollatorForMultipleChoice, set_seed
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronBertForMultipleChoice, MegatronTrainer
from hf_megatron.paper.data import RaceQuestion, RaceQuestions, read_race
from hf_megatron.paper.metrics import metric_path
from hf_megatron.paper.recipe import finetuning_recipe
from hf_megatron.training.starting import where_to_start

HUB = ("ehovy/race", "all")


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory or repository of a BERT and its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--train", type=Path, help="directory of the official files, such as RACE/train")
    parser.add_argument("--validation", type=Path, nargs="+", help="one directory or more, such as RACE/dev")
    parser.add_argument("--size", choices=["336m", "1.3b", "3.9b"], default="336m", help="column of table 6")
    parser.add_argument("--batch", type=int, help="questions of a step, in place of table 6's")
    parser.add_argument("--micro-batch", type=int, help="questions computed at a time, to save memory")
    parser.add_argument("--learning-rate", type=float, help="in place of table 6's")
    parser.add_argument("--epochs", type=float, help="in place of table 6's")
    parser.add_argument("--length", type=int, default=512, help="longest sequence, in tokens")
    parser.add_argument("--option-length", type=int, default=128, help="longest question with an option, in tokens")
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


def read_questions(args: argparse.Namespace) -> tuple[list[RaceQuestion], dict[str, list[RaceQuestion]]]:
    """The questions to learn from, and those to be tested on by name of the split."""
    if args.train is not None:
        return read_race(args.train), {directory.name: read_race(directory) for directory in args.validation}
    splits = load_dataset(*HUB)
    return list(splits["train"]), {name: list(splits[name]) for name in ("validation", "test")}


def main() -> None:
    """Fine-tune, choose, measure and save."""
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate
    tp_size = args.tp or world_size
    changes = {"learning_rate": args.learning_rate, "num_train_epochs": args.epochs}
    arguments = finetuning_recipe("race", args.size).arguments(
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
    model = MegatronBertForMultipleChoice.from_pretrained(args.model, distributed_config=layout)
    lengths = {"max_length": args.length, "max_option_length": args.option_length}
    train, validation = read_questions(args)
    trainer = MegatronTrainer(
        model,
        arguments,
        train_dataset=RaceQuestions(train, tokenizer, **lengths),
        processing_class=tokenizer,
        data_collator=DataCollatorForMultipleChoice(tokenizer),
    )
    trainer.train(resume_from_checkpoint=start)
    metric = evaluate.load(metric_path("race"), keep_in_memory=True)
    scores = {}
    for name, questions in validation.items():
        dataset = RaceQuestions(questions, tokenizer, **lengths)
        chosen = trainer.predict(dataset).predictions.argmax(axis=-1)
        scores[name] = metric.compute(predictions=chosen, references=dataset.references)
    trainer.save_model()
    if trainer.is_world_process_zero():
        (args.output / "metrics.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
        for name, values in scores.items():
            print(name, "  ".join(f"{level} {value:.4f}" for level, value in values.items()))


if __name__ == "__main__":
    main()
