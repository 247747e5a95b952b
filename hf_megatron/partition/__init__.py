"""How one tensor is cut over the ranks of a tensor-parallel group.

Pure: importing this package touches neither torch nor transformers, opens no file and knows no process group.
"""

from hf_megatron.partition.heads import HeadCut
from hf_megatron.partition.spec import Box, FusedSplit, Replicated, Shape, Spec, Split, VocabSplit, chunk_range
from hf_megatron.partition.tiling import tiling_error

__all__ = [
    "Box",
    "FusedSplit",
    "HeadCut",
    "Replicated",
    "Shape",
    "Spec",
    "Split",
    "VocabSplit",
    "chunk_range",
    "tiling_error",
]
