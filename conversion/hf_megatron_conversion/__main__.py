"""``python -m hf_megatron_conversion`` is ``hf-megatron``."""

from hf_megatron_conversion.cli import main

if __name__ == "__main__":
    main()
