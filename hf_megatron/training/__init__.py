"""Training at any layout: MegatronTrainer, its checkpoints, and consistency checks between ranks."""

from hf_megatron.training.restarts import use_fresh_store

use_fresh_store()  # before anything makes a process group
