"""A few small products, reductions and attention by every schedule, for compute-sanitizer: `nox -s sanitize`.

Needs a GPU; no pytest test.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest import mock

import numpy as np

import bikernels
from bikernels.backend.cupy import attention, row_schedules
from bikernels.backend.cupy.compile import Kernel
from bikernels.backend.cupy.launch import gpu
from bikernels.specs import REDUCTIONS
from bikernels.views import Device

from . import test_reduction_schedules as reductions
from .cases import assert_same_bits, draw
from .conftest import BackendUnderTest
from .test_attention_schedules import attend
from .test_schedules import forced, products, run

SHAPES = (((), 72, 40, 136), ((2,), 13, 21, 37))
"""One for the TMA and one that it does not take."""
WARP = 32
ROWS, COLUMNS = (
    ((9, 7), (70, 24), (5, 257), (3, 5000), (3, 5001), (3, 9001)),
    ((13, 1), (24, 40), (16, 300), (16, 2100), (40, 2100)),
)


def every_thread_arriving(kernel_of: Any, *arguments: Any) -> Kernel:
    """The kernel of which no thread arrives at a barrier for others, which racecheck would take for a race."""
    kernel: Kernel = kernel_of(*arguments)
    return kernel._replace(macros=(*kernel.macros, ("ARRIVING", WARP)))


def attend_both_ways(backend: BackendUnderTest) -> int:
    """Decode attention by the kernel for few keys and by the general one, of the same bytes; how many there were."""
    rng, index, ran = np.random.default_rng(9), backend.xp.cuda.runtime.getDevice(), 0
    device, properties = Device("cuda", index), gpu(index)
    for keys, width in ((1, 64), (100, 64), (300, 128), (513, 64)):
        spec = attend(2, 4, 2, keys, width)
        q, k, v = (backend.put(draw(rng, layout.shape, "bfloat16")) for layout in (spec.query, spec.key, spec.value))
        general, short = attention.choose(spec, properties), attention.choose_short(spec, properties)
        runs = [] if general is None else [attention._general(spec, general, device)]
        runs += [] if short is None else [attention._short(spec, short, device)]
        results = []
        for run_attention in runs:
            out = backend.put(np.zeros(spec.out.shape, q.dtype))
            run_attention(0, *(array.data.ptr for array in (out, q, k, v)))
            results.append(backend.get(out))
        for result in results[1:]:
            assert_same_bits(result, results[0], f"{keys} keys of {width}")
        ran += len(results)
    return ran


def main() -> None:
    """Run the products, reductions and attention that the arguments choose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--racecheck", action="store_true", help="every thread arrives at barriers by itself")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of schedules and operations one in N")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="from the I-th on")
    parser.add_argument(
        "--products", type=int, default=1, metavar="N", help="of a schedule's products one in N, in turn"
    )
    parser.add_argument("--rows", action="store_true", help="reductions of rows only, not of columns")
    arguments = parser.parse_args()
    bikernels.backends()
    backend, share, ran = BackendUnderTest("cupy"), slice(arguments.first, None, arguments.every), 0
    cases = [case for case in forced() if backend.can_compute(case.arithmetic)][share]
    for place, case in enumerate(cases):
        some = slice(place % arguments.products, None, arguments.products)
        ran += sum(run(backend, case, product) for product in products(case.dtype, case.arithmetic, SHAPES)[some])
    print(f"{ran} products by {len(cases)} schedules, the bytes of the CPU's", flush=True)
    reductions.ROWS, reductions.COLUMNS = ROWS, () if arguments.rows else COLUMNS
    if arguments.racecheck:
        for name in ("ring_kernel", "softmax_kernel"):
            changed = functools.partial(every_thread_arriving, getattr(row_schedules, name))
            mock.patch.object(row_schedules, name, changed).start()
    for operation in sorted(REDUCTIONS)[share]:
        print(f"{reductions.run(backend, operation, 'bfloat16', 'bfloat16')} {operation}, the bytes of the reference")
    if arguments.first == 0:
        print(f"{attend_both_ways(backend)} times attention, both kernels' bytes the same")


if __name__ == "__main__":
    main()
