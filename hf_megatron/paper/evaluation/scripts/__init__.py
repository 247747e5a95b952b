"""The evaluations as ``evaluate`` modules; ``hf_megatron.paper.evaluation.module_path`` gives their paths."""
