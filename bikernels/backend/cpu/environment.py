"""The processor's floating-point environment while a kernel runs: round to nearest, subnormal numbers kept.

Another library may have set flush-to-zero in the calling thread (`torch.set_flush_denormal`, code compiled with
-ffast-math); a kernel must not see that. On x86 this is the MXCSR register; elsewhere nothing is done.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .compile import kernel, primitive

DEFAULT = 0x1F80
"""MXCSR after a reset: exceptions masked, round to nearest, no flush to zero, subnormal operands kept."""


_HAS_MXCSR = platform.machine() in ("x86_64", "AMD64")


@primitive
def exchange(typing_context: Any, value: Any) -> Any:
    """Set the register (a default of 0 where there is none); what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not _HAS_MXCSR:
            return values[0]
        word = ir.IntType(32)
        place = cgutils.alloca_once(builder, word)
        address = builder.bitcast(place, ir.IntType(8).as_pointer())
        access = ir.FunctionType(ir.VoidType(), [address.type])
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse.stmxcsr", fnty=access), [address])
        before = builder.load(place)
        builder.store(builder.trunc(values[0], word), place)
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse.ldmxcsr", fnty=access), [address])
        return builder.zext(before, ir.IntType(64))

    return types.int64(types.int64), codegen


@kernel
def _set_mxcsr(value):  # type: ignore[no-untyped-def]
    return exchange(value)


def in_default_environment(work: Callable[[], None]) -> None:
    """Call `work` with the default environment in this thread, and put the thread's own back."""
    if not _HAS_MXCSR:
        work()
        return
    before = _set_mxcsr(DEFAULT)
    try:
        work()
    finally:
        _set_mxcsr(before)
