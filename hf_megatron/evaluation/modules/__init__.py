"""The evaluations as ``evaluate`` modules, one a file; ``hf_megatron.evaluation.module_path`` gives their paths."""
