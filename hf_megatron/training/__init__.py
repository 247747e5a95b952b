"""Training at any layout: MegatronTrainer, its checkpoints, consistency checks between ranks, steps on shards."""

from hf_megatron.training.local_step import clip_grad_norm_, step_on_shards

__all__ = ["clip_grad_norm_", "step_on_shards"]
