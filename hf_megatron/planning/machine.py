"""What a machine can do, as figures that others have measured or published; each with its source.

A machine of one's own is a JSON file with the fields of :class:`Machine`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hf_megatron.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal GPUs. Times follow from these figures and nothing else."""

    name: str
    memory_bytes: int  # of one GPU
    reserved_bytes: int = 2 * 10**9  # not to be had: CUDA's context, NCCL's buffers, fragmentation; an assumption
    flops_16bit: float  # peak of dense matrix products, operations per second
    flops_32bit: float
    matmul_efficiency: float  # share of that peak that large products reach
    memory_bandwidth: float  # bytes per second between the GPU and its memory, by the data sheet
    memory_efficiency: float  # share of it that large copies reach
    gpus_per_node: int  # that the fast links connect
    link_bandwidth: float  # bytes per second that a GPU sends, in a ring inside a node, as NCCL reaches them
    node_bandwidth: float  # bytes per second that a whole node sends to others
    # Of a collective before its first step, and of each step of its ring: NCCL's own model of a ring over NVLink with
    # its "simple" protocol (src/graph/tuning.cc, since v2.8).
    latency_seconds: float = 8.4e-6
    step_latency_seconds: float = 3.4e-6
    source: str = ""  # of the figures

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_text = field.name in ("name", "source")
            if not (isinstance(value, str) if is_text else isinstance(value, (int, float)) and value >= 0):
                kind = "text" if is_text else "a number that is not negative"
                raise UnsupportedError(f"{field.name}={value!r} of machine {self.name!r} is not {kind}.")
        for name in ("flops_16bit", "flops_32bit", "matmul_efficiency", "memory_bandwidth", "memory_efficiency"):
            if not getattr(self, name):
                raise UnsupportedError(f"{name} of machine {self.name!r} is zero; nothing would ever be done.")

    def flops(self, itemsize: int) -> float:
        """Operations per second that large products of numbers of this size reach."""
        return (self.flops_16bit if itemsize == 2 else self.flops_32bit) * self.matmul_efficiency

    @property
    def bandwidth(self) -> float:
        """Bytes per second that large copies reach."""
        return self.memory_bandwidth * self.memory_efficiency

    @property
    def usable_bytes(self) -> int:
        """Memory of one GPU that a model can have."""
        return self.memory_bytes - self.reserved_bytes


_GIB = 2**30
_MATMUL = "matrix products: ml-engineering, table of maximum achievable matmul FLOPS (Bekman 2025)"
_MEMORY = "memory: data sheet, and the 90% that Calculon (Isaev et al. 2023) takes for large transfers"

_H100 = Machine(
    name="NVIDIA HGX H100 (8 x H100 SXM 80 GB)",
    memory_bytes=80 * _GIB,
    flops_16bit=989e12,
    flops_32bit=67e12,
    matmul_efficiency=0.803,
    memory_bandwidth=3350e9,
    memory_efficiency=0.9,
    gpus_per_node=8,
    link_bandwidth=370e9,
    node_bandwidth=400e9,
    source=f"peak: data sheet; {_MATMUL}; {_MEMORY}; links: 370 GB/s in a ring (NCCL's maintainers, "
    "NVIDIA/nccl-tests#212); nodes: 8 x 400 Gbit/s",
)

MACHINES: Mapping[str, Machine] = {
    "v100-32gb": Machine(
        name="NVIDIA DGX-2 (16 x V100 32 GB)",
        memory_bytes=32 * _GIB,
        flops_16bit=125e12,
        flops_32bit=15.7e12,
        matmul_efficiency=0.664,
        memory_bandwidth=900e9,
        memory_efficiency=0.833,
        gpus_per_node=16,
        link_bandwidth=120e9,
        node_bandwidth=100e9,
        source="peak: data sheet; matrix products: 83 TFLOP/s, Markidis et al. 2018, arXiv:1803.04014; memory: 750 "
        "GB/s, Jia et al. 2018, arXiv:1804.06826; links: 150 GB/s each way less the 20% that NCCL's protocol takes "
        "(its maintainers, NVIDIA/nccl-tests#212); nodes: Shoeybi et al. 2019, section 5.1",
    ),
    "a100-80gb": Machine(
        name="NVIDIA DGX A100 (8 x A100 80 GB)",
        memory_bytes=80 * _GIB,
        flops_16bit=312e12,
        flops_32bit=19.5e12,
        matmul_efficiency=0.869,
        memory_bandwidth=2039e9,
        memory_efficiency=0.9,
        gpus_per_node=8,
        link_bandwidth=240e9,
        node_bandwidth=200e9,
        source=f"peak: data sheet; {_MATMUL}; {_MEMORY}; links: 300 GB/s each way less 20%, as for V100; nodes: 8 x "
        "200 Gbit/s",
    ),
    "h100": _H100,
    "h200": replace(
        _H100,
        name="NVIDIA HGX H200 (8 x H200 SXM 141 GB)",
        memory_bytes=141 * 10**9,
        memory_bandwidth=4800e9,
        source="the chip and the links of the H100, whose figures these are, with more and faster memory (data sheet)",
    ),
}


# What torch calls a device, and the machine whose figures are its.
_DEVICES = {"H200": "h200", "H100": "h100", "A100": "a100-80gb", "V100": "v100-32gb"}


def machine_of_device(name: str) -> Machine | None:
    """The machine with this GPU, such as ``NVIDIA H200``, if its figures are known."""
    return next((MACHINES[machine] for part, machine in _DEVICES.items() if part in name), None)


def machine_named(name: str | Path) -> Machine:
    """A machine by its name, or from a JSON file; UnsupportedError if there is none, or with other fields."""
    if (known := MACHINES.get(str(name).lower())) is not None:
        return known
    path = Path(name)
    if path.suffix != ".json":
        raise UnsupportedError(f"There is no machine {name!r}; choose {', '.join(MACHINES)}, or give a file.json.")
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UnsupportedError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UnsupportedError(f"{path} is not valid JSON: {error}.") from error
    names = {field.name for field in fields(Machine)}
    if not isinstance(values, dict) or not values.keys() <= names:
        wrong = ", ".join(sorted(values.keys() - names)) if isinstance(values, dict) else "(no object)"
        raise UnsupportedError(f"{path} describes no machine: unknown {wrong}; known are {', '.join(sorted(names))}.")
    try:
        return Machine(**values)
    except TypeError as error:  # what is missing
        raise UnsupportedError(f"{path} describes no machine: {error}.") from None
