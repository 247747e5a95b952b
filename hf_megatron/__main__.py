"""``python -m hf_megatron`` is ``hf-megatron``."""

from hf_megatron.commands.cli import main

if __name__ == "__main__":
    main()
