# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Facts about GPUs, as their makers publish them, and how much of them a model can use.

Memory is what torch.cuda reports, in whole GiB (an "80 GB" card has a little over 79). bf16 is dense tensor-core peak,
without sparsity; float32 is without tensor cores. NVLink and network are one direction of one GPU; the network is that
of the maker's own 8-GPU machine. Sources: NVIDIA's data sheets of A100, H100, H200, B200 and of the DGX machine built
on each; AMD's of MI300X (Infinity Fabric in place of NVLink, a 400 Gb/s card a GPU as its platforms usually have).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory_gib: GiB; bf16_tflops, float32_tflops: TFLOP/s; nvlink_gbs, network_gbs: GB/s one way."""

    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    nvlink_gbs: float
    network_gbs: float


GPUS = {
    "a100-40gb": Gpu(39, 312, 19.5, 300, 25),
    "a100-80gb": Gpu(79, 312, 19.5, 300, 25),
    "h100-80gb": Gpu(79, 989, 67, 450, 50),
    "h800-80gb": Gpu(79, 989, 67, 200, 50),
    "h200-141gb": Gpu(139, 989, 67, 450, 50),
    "b200-180gb": Gpu(178, 2250, 75, 900, 50),
    "mi300x-192gb": Gpu(191, 1307, 163, 448, 50),
}
GPUS_PER_NODE = 8
# Of a GPU's memory; the rest is for the CUDA context, NCCL's buffers and the allocator's waste [assumed].
MEMORY_SHARE = 0.92
EFFICIENCY = 0.35  # share of the bf16 peak that computing reaches [assumed]
LINK_SHARE = 0.7  # of a link's published bandwidth that collectives reach [assumed]


@dataclass(frozen=True)
class Machine:
    """So many GPUs of a kind, of whose peak computing reaches ``efficiency``."""

    gpu: Gpu
    gpus: int
    efficiency: float

    @property
    def usable_bytes(self) -> float:
        return self.gpu.memory_gib * 2**30 * MEMORY_SHARE

    def bandwidth(self, span: int) -> float:
        """Bytes a second between ranks of which ``span`` stand side by side, from the first to the last of a group."""
        return (self.gpu.nvlink_gbs if span <= GPUS_PER_NODE else self.gpu.network_gbs) * 1e9 * LINK_SHARE
