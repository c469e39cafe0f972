# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Facts about GPUs, as their makers publish them.

Memory is what torch.cuda reports, in whole GiB (an "80 GB" card has a little over 79). bf16 is dense tensor-core peak,
without sparsity. NVLink and network are one direction of one GPU; the network is that of the maker's own 8-GPU machine.
Sources: NVIDIA's data sheets of A100, H100, H200, B200 and of the DGX machine built on each; AMD's of MI300X (Infinity
Fabric in place of NVLink, a 400 Gb/s card a GPU as its platforms usually have).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory_gib: GiB; bf16_tflops: TFLOP/s; nvlink_gbs, network_gbs: GB/s one way."""

    memory_gib: float
    bf16_tflops: float
    nvlink_gbs: float
    network_gbs: float


GPUS = {
    "a100-40gb": Gpu(39, 312, 300, 25),
    "a100-80gb": Gpu(79, 312, 300, 25),
    "h100-80gb": Gpu(79, 989, 450, 50),
    "h800-80gb": Gpu(79, 989, 200, 50),
    "h200-141gb": Gpu(139, 989, 450, 50),
    "b200-180gb": Gpu(178, 2250, 900, 50),
    "mi300x-192gb": Gpu(191, 1307, 448, 50),
}
GPUS_PER_NODE = 8
