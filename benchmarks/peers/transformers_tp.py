"""transformers' own tensor parallelism: a plan of styles by module name, for models that have none a plan of one's own.

Stock MegatronBert under such a plan needs two more things, each found by its error:

- ``all_head_size`` is the width that attention reshapes its output to; it has to become this rank's width. ("shape
  '[1, 256, 1024]' is invalid for input of size 131072")
- The decoder's bias is tied to ``cls.predictions.bias``, which the plan has to cut as well. ("aten.addmm.default got
  mixed torch.Tensor and DTensor")

GPT-2 has no plan that works: its ``Conv1D`` is refused ("Conv1D has no `out_features`").
"""

from __future__ import annotations

from transformers.distributed import DistributedConfig

from benchmarks.peers.competitors import Built, Setup
from benchmarks.peers.stock import with_options

__all__ = ["build"]

_LAYER = "bert.encoder.layer.*."
_BERT_PLAN = {
    "bert.embeddings.word_embeddings": "embedding_rowwise",
    _LAYER + "attention.self.query": "colwise",
    _LAYER + "attention.self.key": "colwise",
    _LAYER + "attention.self.value": "colwise",
    _LAYER + "attention.output.dense": "rowwise",
    _LAYER + "intermediate.dense": "colwise",
    _LAYER + "output.dense": "rowwise",
    "cls.predictions.decoder": "colwise_gather_output",
    "cls.predictions.bias": "colwise",
}


def build(setup: Setup) -> Built:
    """Load BERT with the plan above, Llama with the one it brings."""
    is_bert = setup.workload.model == "bert"
    model = setup.workload.stock_class().from_pretrained(
        setup.checkpoint,
        dtype=setup.workload.torch_dtype,
        attn_implementation="eager" if is_bert else "sdpa",  # MegatronBert has no other
        distributed_config=DistributedConfig(tp_size=setup.ranks, tp_plan=_BERT_PLAN if is_bert else "auto"),
    )
    if is_bert:
        for layer in model.bert.encoder.layer:
            layer.attention.self.all_head_size //= setup.ranks
    return with_options(model, setup)
