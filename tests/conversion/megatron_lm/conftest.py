"""What of these tests needs more than the repository."""

from __future__ import annotations

import os

# Checkpoints that Megatron-LM itself saved lie outside of it.
collect_ignore = [] if "HF_MEGATRON_REAL_CHECKPOINTS" in os.environ else ["test_real_checkpoints.py"]
