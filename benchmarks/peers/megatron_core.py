"""megatron-core's GPTModel and BertModel with its local layers, on a CPU, with the stock checkpoint's weights.

It is written for CUDA. On a CPU it needs what is patched here, each found by its error, and these settings: parameters
initialised on the CPU, and the fusions off that are CUDA kernels. Its attention is the unfused one, which is what it
has without Transformer Engine. ``triton`` is imported by it and has to be there, though nothing of it is called.
``bench_host_time`` counts the kernels of its layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from benchmarks.peers.competitors import Built, Setup
from benchmarks.peers.workload import Batch, Workload

__all__ = ["build", "make_model", "over_ranks"]


class _NoTracker:
    """Takes the place of megatron-core's tracker of CUDA random states; of no tensor here does dropout draw values."""

    def is_initialized(self) -> bool:
        return True

    def fork(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()


# Imported by name, so that type checking does not depend on whether megatron-core is there.
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
_parallel_state = import_module("megatron.core.parallel_state")
_config = import_module("megatron.core.transformer.transformer_config")
_bert, _gpt = import_module("megatron.core.models.bert.bert_model"), import_module("megatron.core.models.gpt")
_bert_layers = import_module("megatron.core.models.bert.bert_layer_specs")
_gpt_layers = import_module("megatron.core.models.gpt.gpt_layer_specs")
for _name, _module in list(sys.modules.items()):  # wherever it was imported to
    if _name.startswith("megatron.") and hasattr(_module, "get_cuda_rng_tracker"):
        _module.__dict__["get_cuda_rng_tracker"] = lambda *_, **__: _NoTracker()


def over_ranks(ranks: int) -> None:
    """Set its process groups up for this degree, in place of those of another."""
    _parallel_state.destroy_model_parallel()
    _parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)


def make_model(workload: Workload, ranks: int, fused: bool = False) -> Any:
    """The model, with weights of its own; ``fused`` for what it has ``torch.compile`` fuse."""
    is_gpt = workload.model == "gpt2"
    config = _config.TransformerConfig(
        num_layers=workload.layers,
        hidden_size=workload.hidden,
        num_attention_heads=workload.heads,
        ffn_hidden_size=workload.intermediate,
        tensor_model_parallel_size=ranks,
        params_dtype=workload.torch_dtype,
        pipeline_dtype=workload.torch_dtype,
        bf16=workload.torch_dtype == torch.bfloat16,
        hidden_dropout=workload.dropout,
        attention_dropout=workload.dropout,
        layernorm_epsilon=1e-5 if is_gpt else 1e-12,
        activation_func=_tanh_gelu if is_gpt and not fused else F.gelu,  # fused, it is of tanh
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        persist_layer_norm=False,
    )
    common = {
        "config": config,
        "vocab_size": workload.vocab,
        "max_sequence_length": workload.sequence,
        "parallel_output": True,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "learned_absolute",
    }
    if is_gpt:
        return _gpt.GPTModel(transformer_layer_spec=_gpt_layers.get_gpt_layer_local_spec(), **common)
    layers = _bert_layers.bert_layer_local_spec
    return _bert.BertModel(transformer_layer_spec=layers, num_tokentypes=2, add_binary_head=False, **common)


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _interleave(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Q, K and V, [H, ...] each, to megatron-core's [3H, ...], in which they alternate head by head."""
    by_head = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.stack(by_head, 1).flatten(0, 2)


def _gpt2_weights(checkpoint: Path, workload: Workload) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Names here, whole tensors, and the dimension they are cut on; stock GPT-2 stores matrices as [in, out]."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        read = file.get_tensor
        yield "embedding.word_embeddings.weight", read("transformer.wte.weight"), 0
        yield "embedding.position_embeddings.weight", read("transformer.wpe.weight"), None
        for kind in ("weight", "bias"):
            yield f"decoder.final_layernorm.{kind}", read(f"transformer.ln_f.{kind}"), None
        for index in range(workload.layers):
            theirs, ours = f"transformer.h.{index}.", f"decoder.layers.{index}."
            for kind, row_cut in (("weight", 1), ("bias", None)):

                def tensor(name: str, prefix: str = theirs, kind: str = kind) -> torch.Tensor:
                    read_tensor: torch.Tensor = read(f"{prefix}{name}.{kind}")
                    return read_tensor.t() if read_tensor.ndim == 2 else read_tensor

                fused = _interleave(list(tensor("attn.c_attn").chunk(3)), workload.heads)
                yield f"{ours}self_attention.linear_qkv.{kind}", fused, 0
                yield f"{ours}self_attention.linear_proj.{kind}", tensor("attn.c_proj"), row_cut
                yield f"{ours}mlp.linear_fc1.{kind}", tensor("mlp.c_fc"), 0
                yield f"{ours}mlp.linear_fc2.{kind}", tensor("mlp.c_proj"), row_cut
                yield f"{ours}input_layernorm.{kind}", tensor("ln_1"), None
                yield f"{ours}pre_mlp_layernorm.{kind}", tensor("ln_2"), None


def _bert_weights(checkpoint: Path, workload: Workload) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """As :func:`_gpt2_weights`; stock MegatronBert stores matrices as [out, in]."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        read = file.get_tensor
        for name, cut in (("word", 0), ("position", None), ("tokentype", None)):
            stock = name.replace("tokentype", "token_type")
            yield f"embedding.{name}_embeddings.weight", read(f"bert.embeddings.{stock}_embeddings.weight"), cut
        yield "output_layer.bias", read("cls.predictions.bias"), 0
        for kind, row_cut in (("weight", 1), ("bias", None)):
            yield f"encoder.final_layernorm.{kind}", read(f"bert.encoder.ln.{kind}"), None
            yield f"lm_head.dense.{kind}", read(f"cls.predictions.transform.dense.{kind}"), None
            yield f"lm_head.layer_norm.{kind}", read(f"cls.predictions.transform.LayerNorm.{kind}"), None
            for index in range(workload.layers):
                theirs, ours = f"bert.encoder.layer.{index}.", f"encoder.layers.{index}."
                parts = [read(f"{theirs}attention.self.{name}.{kind}") for name in ("query", "key", "value")]
                yield f"{ours}self_attention.linear_qkv.{kind}", _interleave(parts, workload.heads), 0
                yield (
                    f"{ours}self_attention.linear_proj.{kind}",
                    read(f"{theirs}attention.output.dense.{kind}"),
                    row_cut,
                )
                yield f"{ours}mlp.linear_fc1.{kind}", read(f"{theirs}intermediate.dense.{kind}"), 0
                yield f"{ours}mlp.linear_fc2.{kind}", read(f"{theirs}output.dense.{kind}"), row_cut
                yield f"{ours}input_layernorm.{kind}", read(f"{theirs}attention.ln.{kind}"), None
                yield f"{ours}pre_mlp_layernorm.{kind}", read(f"{theirs}ln.{kind}"), None


def _load(model: Any, setup: Setup) -> None:
    """Give every parameter this rank's part of the checkpoint."""
    weights = _gpt2_weights if setup.workload.model == "gpt2" else _bert_weights
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor, cut in weights(setup.checkpoint, setup.workload):
            parameter = missing.pop(name)
            parameter.copy_(tensor if cut is None else tensor.chunk(setup.ranks, cut)[setup.rank])
    if missing:
        raise ValueError(f"not in the checkpoint: {', '.join(missing)}")


def build(setup: Setup) -> Built:
    """Build the model and copy the checkpoint's weights into it."""
    if setup.device.type != "cpu":
        raise ValueError("megatron-core is set up for the CPU here; on a GPU it would need Transformer Engine")
    over_ranks(setup.ranks)
    workload = setup.workload
    model = make_model(workload, setup.ranks).to(workload.torch_dtype).train()
    _load(model, setup)
    sequence = workload.sequence
    causal_mask = torch.triu(torch.ones(sequence, sequence, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(sequence).expand(workload.batch, -1)
    whole = torch.ones(workload.batch, sequence, dtype=torch.long)

    def gpt2_loss(batch: Batch) -> torch.Tensor:
        following = F.pad(batch["labels"][:, 1:], (0, 1))
        losses: torch.Tensor = model(batch["input_ids"], positions, causal_mask, labels=following)  # [B, S]
        return losses[:, :-1].float().mean()

    def bert_loss(batch: Batch) -> torch.Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        losses, _ = model(ids, whole, tokentype_ids=torch.zeros_like(ids), lm_labels=labels.clamp(min=0))  # [B, S]
        loss: torch.Tensor = losses[labels != -100].float().mean()
        return loss

    loss = gpt2_loss if workload.model == "gpt2" else bert_loss
    return Built(model, loss, model.embedding.position_embeddings.weight)
