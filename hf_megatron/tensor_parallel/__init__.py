"""Tensor parallelism: region functions, layers, the loss, and dropout that does not depend on the degree."""

from hf_megatron.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from hf_megatron.tensor_parallel.embedding import VocabParallelEmbedding
from hf_megatron.tensor_parallel.group import SINGLE, TensorParallelGroup, local, non_finite_names
from hf_megatron.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel_linear
from hf_megatron.tensor_parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from hf_megatron.tensor_parallel.mappings import (
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_parallel_region,
)
from hf_megatron.tensor_parallel.parallel_module import ParallelModule, replicated_parameters
from hf_megatron.tensor_parallel.placement import parallelize_module
from hf_megatron.tensor_parallel.random import attention_dropout, broadcast_from_first_rank, synchronize_random_state
from hf_megatron.tensor_parallel.replicated import (
    HiddenDropout,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
)
from hf_megatron.tensor_parallel.sequence_parallel import SequenceParallelRegion
from hf_megatron.tensor_parallel.shared_heads import complete_heads

__all__ = [
    "SINGLE",
    "ColumnParallelLinear",
    "HiddenDropout",
    "ParallelModule",
    "ReplicatedEmbedding",
    "ReplicatedLayerNorm",
    "ReplicatedLinear",
    "RowParallelLinear",
    "SequenceParallelRegion",
    "TensorParallelGroup",
    "VocabParallelEmbedding",
    "attention_dropout",
    "broadcast_from_first_rank",
    "column_parallel_linear",
    "complete_heads",
    "copy_to_tensor_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_parallel_region",
    "local",
    "non_finite_names",
    "parallelize_module",
    "reduce_from_tensor_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "replicated_parameters",
    "scatter_to_tensor_parallel_region",
    "synchronize_random_state",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
