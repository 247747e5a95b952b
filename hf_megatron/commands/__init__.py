"""The command ``hf-megatron``. Each command imports what it needs when it runs, so that ``--help`` is quick."""
