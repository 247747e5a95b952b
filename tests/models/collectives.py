"""What ranks send each other, as it is sent."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Collective = tuple[str, int]  # name and bytes of the result


class Recorder(TorchDispatchMode):
    """Notes every collective, whoever issues it: by torch.distributed or by DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor") and "wait" not in name:
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.seen.append((name, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return func(*args, **(kwargs or {}))
