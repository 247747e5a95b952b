"""What a training run needs, and how fast it is, before any machine is rented: from the tables, without torch.

    from hf_megatron.planning import MACHINES, ModelShape, Run, plan

    shape = ModelShape.from_config(config.to_dict())
    result = plan(shape, Run(tp_size=8, micro_batch=8, recompute="full"), MACHINES["a100-80gb"])
    print(result.memory.peak, result.fits, result.time.total)

``hf-megatron plan`` is the same on the command line.
"""

from hf_megatron.planning.machine import MACHINES, Machine, machine_named, machine_of_device
from hf_megatron.planning.memory import MemoryPlan, plan_memory
from hf_megatron.planning.planner import StepTime, TrainingPlan, layouts, plan
from hf_megatron.planning.run import PRECISIONS, Precision, Run
from hf_megatron.planning.shape import ModelShape
from hf_megatron.planning.traffic import Collective, collectives

__all__ = [
    "MACHINES",
    "PRECISIONS",
    "Collective",
    "Machine",
    "MemoryPlan",
    "ModelShape",
    "Precision",
    "Run",
    "StepTime",
    "TrainingPlan",
    "collectives",
    "layouts",
    "machine_named",
    "machine_of_device",
    "plan",
    "plan_memory",
]
