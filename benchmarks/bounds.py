"""What the hardware allows: the least time of a product or a reduction on an H200 or an H100, in microseconds.

Sources of the constants, all but the last of an NVIDIA H200, whose multiprocessors are those of an H100:

- 790 TFLOP/s: an 8192^3 product of random bf16 data through cuBLAS (power, not the datasheet's 990, is the limit);
- 66.9 TFLOP/s in fp32: 132 multiprocessors, 128 fused multiply-adds a cycle each, 1.98 GHz; the datasheet gives 67 for
  fp32 and for the tensor cores in fp64;
- 4.3 TB/s: a copy from device memory to device memory, bytes read and written (reads alone are
  faster, so a product of few rows may come out below its floor);
- 24 cycles: a step of `mma.sync.m16n8k16` that waits for the one before it, timed on one multiprocessor. The order of
  additions chains K / 16 of them whatever the schedule, so a product takes at least that long;
- 3.35 TB/s: the datasheet's memory bandwidth of an H100 SXM, of which copies reach less.
"""

from __future__ import annotations

from bikernels.contract import ARITHMETIC

BYTES_PER_SECOND = {"H200": 4.3e12, "H100": 3.35e12}
"""By what the name of a GPU holds."""
FLOPS_PER_SECOND = {"bf16": 790e12, "fp16": 790e12, "fp32": 66.9e12, "fp64": 66.9e12}
CHAIN_CYCLES, CLOCK = 24, 1.98e9
CHAIN_RATIO = 16
"""K / N from which on the chain may take longer than the weights."""
CHAIN_GROUP = {"bf16": ARITHMETIC["tc16f25"].group, "fp16": ARITHMETIC["tc16f25"].group}


def known(gpu: str) -> bool:
    """Whether the constants of this module are those of the GPU of this name."""
    return any(name in gpu for name in BYTES_PER_SECOND)


def floor_us(gpu: str, dtype: str, flops: float, moved: float) -> float:
    """The larger of arithmetic and traffic. `moved` is in bytes: every input read once, every output written once."""
    bandwidth = next(value for name, value in BYTES_PER_SECOND.items() if name in gpu)
    return 1e6 * max(flops / FLOPS_PER_SECOND[dtype], moved / bandwidth)


def chain_us(dtype: str, k: int) -> float:
    """The K / 16 dependent steps of a tensor-core product; 0 for dtypes whose chain has not been timed."""
    if dtype not in CHAIN_GROUP:
        return 0.0
    return 1e6 * -(-k // CHAIN_GROUP[dtype]) * CHAIN_CYCLES / CLOCK
