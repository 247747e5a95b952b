"""Tensor-parallel BERT, with the paper's placement of its LayerNorms and the original one."""
