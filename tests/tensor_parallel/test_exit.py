"""How a process that used collectives ends."""

import subprocess
import sys
from pathlib import Path

# The threads of gloo still hold these tensors when the main thread is done. Several worlds, as each may be lucky.
_WORLDS = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from hf_megatron.tensor_parallel.group import TensorParallelGroup

processes = []
for index in range(4):
    process = os.fork()
    if process == 0:
        break
    processes.append(process)
else:
    sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0 for process in processes))
world, rank = divmod(index, 2)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-{world}", rank=rank, world_size=2)
group = TensorParallelGroup.from_mesh(init_device_mesh("cpu", (2,)))
for _ in range(20):
    dist.all_reduce(torch.ones(1000), group=group.process_group, async_op=True)
dist.destroy_process_group()
"""


def test_unfinished_collectives_do_not_abort(tmp_path: Path) -> None:
    """Catches, most of the time, "terminate called without an active exception": a job fails after it has saved."""
    command = [sys.executable, "-c", _WORLDS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
