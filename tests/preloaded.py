"""What every rank would otherwise do anew: imported by the fork server, and so inherited by all ranks."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

# Builds the names of all architectures' tensors, half a second of regular expressions, and keeps them.
get_checkpoint_conversion_mapping("gpt2")
