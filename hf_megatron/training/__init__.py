"""Training at any layout: MegatronTrainer, its checkpoints, and consistency checks between ranks."""
