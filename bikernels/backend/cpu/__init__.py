"""The CPU backend: Numba kernels for NumPy arrays and other memory of the host. It computes every arithmetic class.

`matmul.py` drives matrix products, with the inner loops of `fma.py` and `tensor_core.py`, and of `stream.py` for few
rows; `softmax.py` and `sums.py` are the reductions, the latter by the formulas of `formulas.py`, on the rows of
`rows.py` and the sums of `sum_tree.py`; `direct.py` has the same for rows that need not be moved, which is most of
them; `elementwise.py` applies the functions of `functions.py`.
`convert.py` reads and writes operands of every dtype; `numerics.py`, `elementary.py` and `vectors.py` have the
operations all of them are made of; `compile.py` says how they are compiled and `threads.py` in which threads they run,
those of `pool.py` among them.
"""

from __future__ import annotations

from ... import contract
from ...specs import ELEMENTWISE, REDUCTIONS, AttentionSpec, ElementwiseSpec, MatmulSpec, ReductionSpec
from ...views import CPU, Device
from .. import ElementwiseLaunch, MatmulLaunch, ReductionLaunch


class CpuBackend:
    name = "cpu"
    device_type = "cpu"
    reductions = frozenset(REDUCTIONS)
    elementwise = frozenset(ELEMENTWISE)

    def unavailable(self) -> str | None:
        return None

    def devices(self) -> list[Device]:
        return [CPU]

    def native_arithmetic(self, dtype: str, device: Device) -> str:
        return contract.native_arithmetic(dtype)

    def computes(self, arithmetic: str, device: Device) -> bool:
        return arithmetic in contract.ARITHMETIC

    def prepare_matmul(self, spec: MatmulSpec, device: Device) -> MatmulLaunch:
        from . import matmul

        return matmul.prepare(spec)

    def prepare_reduction(self, spec: ReductionSpec, device: Device) -> ReductionLaunch:
        from . import softmax, sums

        return (softmax if spec.operation in softmax.OPERATIONS else sums).prepare(spec)

    def prepare_elementwise(self, spec: ElementwiseSpec, device: Device) -> ElementwiseLaunch:
        from . import elementwise

        return elementwise.prepare(spec)

    def prepare_attention(self, spec: AttentionSpec, device: Device) -> None:
        return None


backend = CpuBackend()
