"""A few small products and reductions by every schedule, for compute-sanitizer: `nox -s sanitize`.

Needs a GPU; no pytest test.
"""

from __future__ import annotations

import argparse

import bikernels
from bikernels.specs import REDUCTIONS

from . import test_reduction_schedules as reductions
from .conftest import BackendUnderTest
from .test_schedules import forced, products, run

SHAPES = (((), 72, 40, 136), ((2,), 13, 21, 37))
"""One for the TMA and one that it does not take."""
ROWS, COLUMNS = ((9, 7), (70, 24), (5, 257), (3, 5001)), ((13, 1), (24, 40), (16, 2100))


def main() -> None:
    """Run the products and reductions that the arguments choose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of schedules and operations one in N")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="from the I-th on")
    arguments = parser.parse_args()
    bikernels.backends()
    backend, share = BackendUnderTest("cupy"), slice(arguments.first, None, arguments.every)
    cases = [case for case in forced() if backend.can_compute(case.arithmetic)][share]
    ran = sum(
        run(backend, case, product) for case in cases for product in products(case.dtype, case.arithmetic, SHAPES)
    )
    print(f"{ran} products by {len(cases)} schedules, the bytes of the CPU's")
    reductions.ROWS, reductions.COLUMNS = ROWS, COLUMNS
    operations = sorted(REDUCTIONS)[share]
    reduced = sum(reductions.run(backend, operation, "bfloat16", "bfloat16") for operation in operations)
    print(f"{reduced} reductions of {len(operations)} operations, the bytes of the reference")


if __name__ == "__main__":
    main()
