"""Integration with transformers' tensor parallelism: a parallel style, which the plans name.

transformers walks a plan of ``module or parameter name -> style`` and lets the style replace parameters by DTensors
and modules' forwards by wrapped ones. Our style takes the partition specs from each module and wraps nothing, because
the modules communicate themselves.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from hf_megatron.models.configuration import STYLE_NAME
from hf_megatron.tensor_parallel import ParallelModule, TensorParallelGroup
from hf_megatron.tensor_parallel.placement import shard_parameter


class MegatronStyle(TensorParallelLayer):
    """The parallel style used by every entry of our plans."""

    def shard_param(self, module: ParallelModule, param: str, mesh: DeviceMesh) -> None:
        """Replace a parameter by a DTensor that holds this rank's shard."""
        shard_parameter(module, param, mesh)

    def install_forward(self, module: ParallelModule, mesh: DeviceMesh) -> ParallelModule:
        """Set the module's tensor-parallel group; its forward is not changed."""
        module.set_tensor_parallel(TensorParallelGroup.from_mesh(mesh))
        return module


ALL_PARALLEL_STYLES.register(STYLE_NAME, MegatronStyle())
