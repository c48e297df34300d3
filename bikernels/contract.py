"""The contract: what decides bits, in one place. `docs/contract.md` states it in prose; it imports no other module.

Every backend reads its constants from here, and `reference.py` computes the contract in plain NumPy. Nothing in this
module depends on speed: tiles, vector widths and launch shapes belong to the backends.
"""

from __future__ import annotations

from typing import NamedTuple

VERSION = 1
"""Rises whenever any result of any operation changes in any bit."""

# --------------------------------------------------------------------------------------------------- data types

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")
INTEGER_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

ITEMSIZE = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip

ACCUMULATE = {"bfloat16": "float32", "float16": "float32", "float32": "float32", "float64": "float64"}
"""The dtype in which an operation whose operands have the key's dtype adds up. A cast to a narrower dtype goes through
the accumulate dtype of its target: float64 -> float32 -> bfloat16, int64 -> float32 -> float16."""

CANONICAL_NAN = {"bfloat16": 0x7FFF, "float16": 0x7FFF, "float32": 0x7FFFFFFF, "float64": 0x7FF8000000000000}
"""The only NaN that is ever written, per dtype."""

# ------------------------------------------------------------------------------------------------ matrix products


class Arithmetic(NamedTuple):
    """How a matrix product folds its K products into one accumulator."""

    name: str
    covers: tuple[str, ...]
    group: int
    """Products added in one step; K is folded in order in groups of this size, the tail padded with zeros."""
    fraction_bits: int | None
    """Bits kept below the largest exponent of a tensor core's step; None: every step is one correctly rounded fma."""
    floor: int
    """The least exponent to which a tensor core aligns."""

    @property
    def is_tensor_core(self) -> bool:
        return self.fraction_bits is not None


ARITHMETIC = {
    arithmetic.name: arithmetic
    for arithmetic in (
        Arithmetic("tc16f25", ("bfloat16", "float16"), group=16, fraction_bits=25, floor=-133),
        Arithmetic("tc8f24", ("bfloat16", "float16"), group=8, fraction_bits=24, floor=-132),
        Arithmetic("fma32", ("bfloat16", "float16", "float32"), group=1, fraction_bits=None, floor=0),
        Arithmetic("fma64", ("float64",), group=1, fraction_bits=None, floor=0),
    )
}

PORTABLE_ARITHMETIC = {"bfloat16": "fma32", "float16": "fma32", "float32": "fma32", "float64": "fma64"}
"""The classes that every machine computes; native on a CPU and on a GPU whose tensor cores are not known."""

EXPONENT_MIN = {"bfloat16": -126, "float16": -14, "float32": -126, "float64": -1022}
"""The exponent with which a subnormal number counts."""


def tensor_core_arithmetic(compute_capability: tuple[int, int]) -> str | None:
    """The class that this GPU's tensor cores compute for bfloat16 and float16, or None where it is not known."""
    if compute_capability in ((9, 0), (10, 0), (10, 3)):
        return "tc16f25"
    if compute_capability[0] == 8:
        return "tc8f24"
    return None


def native_arithmetic(dtype: str, compute_capability: tuple[int, int] | None = None) -> str:
    """The class used when the caller names none; `compute_capability` None stands for a CPU."""
    if compute_capability is not None and ACCUMULATE[dtype] == "float32" and dtype != "float32":
        return tensor_core_arithmetic(compute_capability) or PORTABLE_ARITHMETIC[dtype]
    return PORTABLE_ARITHMETIC[dtype]


# ------------------------------------------------------------------------------------------------------- sum tree

SUM_LANES = 256
"""Element i of a chunk is added, in order of i, to lane i mod SUM_LANES, which starts at +0."""

SUM_CHUNK = 2048
"""Elements per chunk. The lanes of a chunk are added as neighbours: lane 2j and lane 2j+1, until one is left. The sums
of the chunks are the elements of the next level, to which the same rule applies, until there is one chunk."""

# ----------------------------------------------------------------------------------------------------- exp and log


class ExpConstants(NamedTuple):
    """The numbers of exp in one dtype; `docs/polynomials.py` derives them and measures the error."""

    log2e: float
    magic: float
    """1.5 * 2^p + 2 * bias, p the significand's bits after the point: adding it leaves the rounded integer i + 2 * bias
    in the low bits of the sum."""
    ln2_high: float
    ln2_low: float
    low: float
    """Stands for every smaller argument: the result rounds to +0."""
    high: float
    """Stands for every larger argument: the last product overflows to infinity."""
    coefficients: tuple[float, ...]
    """Of f^0, f^1, … on |f| <= ln(2) / 2."""


class LogConstants(NamedTuple):
    """The numbers of log in one dtype; `docs/polynomials.py` derives them and measures the error."""

    cut: int
    """Bits of the least reduced argument m, which lies in [cut, 2 * cut)."""
    ln2_high: float
    ln2_low: float
    """0 in float32, where one fma with ln2_high is accurate enough."""
    coefficients: tuple[float, ...]
    """Of f^2, f^3, … with f = m - 1; those of f^0 and f^1 are 0 and 1."""


def _hex(*texts: str) -> tuple[float, ...]:
    return tuple(float.fromhex(text) for text in texts)


EXP = {
    "float32": ExpConstants(
        log2e=float.fromhex("0x1.715476p+0"),
        magic=float.fromhex("0x1.8001fcp+23"),
        ln2_high=float.fromhex("0x1.62e430p-1"),
        ln2_low=float.fromhex("-0x1.05c610p-29"),
        low=float.fromhex("-0x1.ap+6"),
        high=float.fromhex("0x1.64p+6"),
        coefficients=_hex(
            "0x1p+0", "0x1p+0", "0x1.fffffap-2", "0x1.555492p-3", "0x1.5559fep-5", "0x1.12397ep-7", "0x1.697b94p-10"
        ),
    ),
    "float64": ExpConstants(
        log2e=float.fromhex("0x1.71547652b82fep+0"),
        magic=float.fromhex("0x1.80000000007fep+52"),
        ln2_high=float.fromhex("0x1.62e42fefa39efp-1"),
        ln2_low=float.fromhex("0x1.abc9e3b39803fp-56"),
        low=float.fromhex("-0x1.75p+9"),
        high=float.fromhex("0x1.63p+9"),
        coefficients=_hex(
            "0x1p+0",
            "0x1p+0",
            "0x1.0000000000007p-1",
            "0x1.55555555554d2p-3",
            "0x1.555555555130ep-5",
            "0x1.1111111130ae9p-7",
            "0x1.6c16c1825a821p-10",
            "0x1.a01a00fe0bc94p-13",
            "0x1.a0199e1de3ea7p-16",
            "0x1.71df8124210f4p-19",
            "0x1.28aa386f4ce12p-22",
            "0x1.acf713e6ef8b6p-26",
        ),
    ),
}

LOG = {
    "float32": LogConstants(
        cut=0x3F2AAAAB,
        ln2_high=float.fromhex("0x1.62e430p-1"),
        ln2_low=float.fromhex("0x0p+0"),
        coefficients=_hex(
            "-0x1.000000p-1",
            "0x1.555508p-2",
            "-0x1.fffeecp-3",
            "0x1.99d070p-3",
            "-0x1.559caap-3",
            "0x1.1ed662p-3",
            "-0x1.f334d4p-4",
            "0x1.1e685ep-3",
            "-0x1.07c88cp-3",
        ),
    ),
    "float64": LogConstants(
        cut=0x3FE6000000000000,
        ln2_high=float.fromhex("0x1.62e42fefa39efp-1"),
        ln2_low=float.fromhex("0x1.abc9e3b39803fp-56"),
        coefficients=_hex(
            "-0x1.0000000000001p-1",
            "0x1.55555555555eep-2",
            "-0x1.ffffffffff903p-3",
            "0x1.999999997be7ep-3",
            "-0x1.555555558b856p-3",
            "0x1.2492493424bdfp-3",
            "-0x1.fffffff244af8p-4",
            "0x1.c71c69d7639a0p-4",
            "-0x1.999996cf8466bp-4",
            "0x1.745e3a1ef515dp-4",
            "-0x1.555661424fa94p-4",
            "0x1.3afacf12433d7p-4",
            "-0x1.246fb80b9f87cp-4",
            "0x1.1259c738da77cp-4",
            "-0x1.025731cf52ed8p-4",
            "0x1.ce705b9d08f21p-5",
            "-0x1.9a35381d71dbfp-5",
            "0x1.f49a88b0a5b8bp-5",
            "-0x1.3abd75ee42280p-4",
            "0x1.77569b6da1d57p-5",
        ),
    ),
}
