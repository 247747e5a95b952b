"""Pretrain a small BERT from text, in one process or on tensor-parallel ranks.

    python examples/pretrain_bert.py --output bert
    torchrun --nproc-per-node 2 examples/pretrain_bert.py --output bert --layernorm-placement post --text book.txt

It trains a WordPiece tokenizer and then the model, as the Megatron-LM paper does: whole-word n-gram masking, sentence
order, Adam with a linear warm-up and decay. However many ranks there are, they learn the same weights, up to rounding.
Without --text it learns from the help topics that come with Python.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_megatron import MegatronBertConfig, MegatronBertForPreTraining
from hf_megatron.data import DataCollatorForMegatronBertPretraining, sentence_order_pairs, tokenize_sentences


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 text files, each a document")
    parser.add_argument("--tokenizer", help="directory or repository of a tokenizer, instead of training one")
    parser.add_argument("--layernorm-placement", choices=["pre", "post"], default="pre")
    parser.add_argument("--vocab-size", type=int, default=4096, help="largest vocabulary to train")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4, help="the number of ranks has to divide it")
    parser.add_argument("--length", type=int, default=128, help="longest sequence, in tokens")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=50, help="steps until the peak learning rate")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1909)
    return parser.parse_args()


def read_texts(files: list[Path] | None) -> list[str]:
    """The documents to learn from."""
    if files is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    return [file.read_text(encoding="utf-8") for file in files]


def train_tokenizer(texts: list[str], args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer asked for, or a lower-case WordPiece one that the first rank trains and saves and all load."""
    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        tokenizer.save_pretrained(args.output)
    elif int(os.environ.get("RANK", "0")) == 0:
        tokenizer = BertTokenizerFast(model_max_length=args.length)
        tokenizer = tokenizer.train_new_from_iterator(texts, args.vocab_size, show_progress=False)
        tokenizer.save_pretrained(args.output)
    if dist.is_initialized():
        dist.barrier()
    return AutoTokenizer.from_pretrained(args.output)


def batches(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end. The seed makes them the same on all ranks, as tensor parallelism needs them."""
    documents = [tokenize_sentences(tokenizer, text) for text in texts]
    collate = DataCollatorForMegatronBertPretraining(tokenizer, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        # Cut, swapped and masked anew in each epoch.
        pairs = list(sentence_order_pairs(documents, tokenizer, max_length=args.length, generator=generator))
        if not pairs:
            raise SystemExit("There are no two sentences in the text; give more with --text.")
        for chosen in torch.randperm(len(pairs), generator=generator).split(args.batch):
            yield collate([pairs[i] for i in chosen])


def train(model: MegatronBertForPreTraining, data: Iterator[dict[str, torch.Tensor]], args: argparse.Namespace) -> None:
    """Train, and print the mean loss of the steps since the line before."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=args.learning_rate
    )
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / args.warm_up, 1 - step / args.steps))
    losses: list[float] = []
    for step in range(1, args.steps + 1):
        batch = {name: tensor.to(model.device) for name, tensor in next(data).items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step % 20 == 0 or step == args.steps) and model.tp_group.rank == 0:
            print(f"step {step:5d}  loss {sum(losses) / len(losses):.4f}", flush=True)
            losses.clear()


def main() -> None:
    """Train the tokenizer and the model, and save both."""
    args = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    layout = None
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group()
        layout = DistributedConfig(tp_size=dist.get_world_size())
    texts = read_texts(args.text)
    tokenizer = train_tokenizer(texts, args)
    config = MegatronBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.length,
        layernorm_placement=args.layernorm_placement,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = MegatronBertForPreTraining.from_config(config, distributed_config=layout)
    train(model, batches(texts, tokenizer, args), args)
    model.save_pretrained(args.output)
    if layout is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
