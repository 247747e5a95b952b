"""Fine-tune a BERT to answer questions on a text (SQuAD 1.1 and 2.0), with the Megatron-LM paper's hyper-parameters.

    python examples/finetune_squad.py --model bert --train train-v1.1.json --validation dev-v1.1.json --output qa
    torchrun --nproc-per-node 2 examples/finetune_squad.py --model bert --version 2.0 --output qa
    accelerate launch --num_processes 4 examples/finetune_squad.py --model bert --tp 2 --output qa

The model is cut over all processes; with --tp N over groups of N, which then share the batch. Without --train the data
comes from the Hub. Left in --output: the model, its metrics, and the answers in the form the official script reads.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.distributed import DistributedConfig

from hf_megatron import MegatronBertForQuestionAnswering, MegatronTrainer
from hf_megatron.paper.data import Answer, Question, QuestionWindows, find_answers, read_squad
from hf_megatron.paper.metrics import metric_path
from hf_megatron.paper.recipe import finetuning_recipe
from hf_megatron.training.starting import where_to_start

HUB = {"1.1": "rajpurkar/squad", "2.0": "rajpurkar/squad_v2"}


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory or repository of a BERT and its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--version", choices=list(HUB), default="1.1", help="2.0: questions may have no answer")
    parser.add_argument("--train", type=Path, help="official file, such as train-v1.1.json")
    parser.add_argument("--validation", type=Path, help="official file, such as dev-v1.1.json")
    parser.add_argument(
        "--size", choices=["336m", "1.3b", "3.9b"], default="336m", help="column of the paper's table 6"
    )
    parser.add_argument("--batch", type=int, help="windows of a step, in place of table 6's")
    parser.add_argument("--micro-batch", type=int, help="windows computed at a time, to save memory")
    parser.add_argument("--learning-rate", type=float, help="in place of table 6's")
    parser.add_argument("--epochs", type=float, help="in place of table 6's")
    parser.add_argument("--length", type=int, default=384, help="longest window, in tokens")
    parser.add_argument("--stride", type=int, default=128, help="tokens by which windows advance")
    parser.add_argument("--question-length", type=int, default=64, help="longest question, in tokens")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--keep-activations", action="store_true", help="for the backward pass: more memory, less time")
    parser.add_argument("--tp", type=int, help="tensor-parallel degree; all processes if not given")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    args = parser.parse_args()
    if (args.train is None) != (args.validation is None):
        parser.error("--train and --validation go together; without both the data comes from the Hub.")
    for path in (path for path in (args.train, args.validation) if path is not None):
        if not path.exists():
            parser.error(f"there is no {path}.")
    positions = AutoConfig.from_pretrained(args.model).max_position_embeddings
    if args.length > positions:
        parser.error(f"--length {args.length} is more than the model's {positions} positions.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tp is not None and (args.tp < 1 or world_size % args.tp):
        parser.error(f"--tp {args.tp} does not divide the {world_size} processes.")
    return args


def read_questions(args: argparse.Namespace) -> tuple[list[Question], list[Question]]:
    """The questions to learn from and those to be tested on."""
    if args.train is not None:
        return read_squad(args.train), read_squad(args.validation)
    splits = load_dataset(HUB[args.version])
    return list(splits["train"]), list(splits["validation"])


def report(answers: list[Answer], questions: list[Question], args: argparse.Namespace) -> None:
    """Measure the answers, and write them down."""
    has_unanswerable = args.version == "2.0"
    metric = evaluate.load(metric_path("squad_v2" if has_unanswerable else "squad"), keep_in_memory=True)
    predictions: list[dict[str, Any]] = [{"id": answer.id, "prediction_text": answer.text} for answer in answers]
    references = [{"id": question["id"], "answers": question["answers"]} for question in questions]
    options: dict[str, Any] = {}
    if has_unanswerable:
        options["no_answer_threshold"] = 0.5
        for prediction, answer in zip(predictions, answers, strict=True):
            prediction["no_answer_probability"] = answer.no_answer_probability
    scores = metric.compute(predictions=predictions, references=references, **options)
    texts = {answer.id: answer.text for answer in answers}
    if has_unanswerable:
        texts |= {a.id: "" for a in answers if a.no_answer_probability > scores["best_f1_thresh"]}
        odds = {answer.id: answer.no_answer_score for answer in answers}
        (args.output / "null_odds.json").write_text(json.dumps(odds, indent=1), encoding="utf-8")
    (args.output / "predictions.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
    (args.output / "metrics.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    print("  ".join(f"{name} {value:.2f}" for name, value in scores.items()))


def main() -> None:
    """Fine-tune, answer, measure and save."""
    args = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate
    tp_size = args.tp or world_size
    changes = {"learning_rate": args.learning_rate, "num_train_epochs": args.epochs}
    arguments = finetuning_recipe(f"squad-{args.version}", args.size).arguments(
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
    model = MegatronBertForQuestionAnswering.from_pretrained(args.model, distributed_config=layout)
    lengths = {
        "max_length": args.length,
        "doc_stride": args.stride,
        "max_question_length": args.question_length,
    }
    train, validation = (QuestionWindows(questions, tokenizer, **lengths) for questions in read_questions(args))
    trainer = MegatronTrainer(
        model,
        arguments,
        train_dataset=train,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train(resume_from_checkpoint=start)
    start_logits, end_logits = trainer.predict(validation).predictions
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(find_answers(validation, start_logits, end_logits), validation.questions, args)


if __name__ == "__main__":
    main()
