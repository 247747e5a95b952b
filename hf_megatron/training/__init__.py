"""Training at any layout: MegatronTrainer, its checkpoints, and the checks that hold the ranks together."""
