"""Training at any layout: MegatronTrainer, its checkpoints, consistency checks between ranks, steps on shards."""

from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards
from hf_megatron.training.restarts import use_fresh_store

use_fresh_store()  # before anything makes a process group

__all__ = ["clip_grad_norm_", "step_on_shards"]
