"""The command ``hf-megatron``: ``cli`` runs it, and each subcommand is the module of its name.

What a subcommand needs is imported when it runs, so that ``--help`` is quick.
"""
