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

# -------------------------------------------------------------------------------------------- elementwise functions


class NormalConstants(NamedTuple):
    """The numbers of erf and of the normal distribution's functions in one dtype; derived by `docs/polynomials.py`."""

    root_two: float
    density: float
    """1 / sqrt(2 pi)."""
    gelu_slope: float
    """2 sqrt(2 / pi), of the tanh form of gelu."""
    gelu_cubic: float
    """That times 0.044715."""
    gelu_cubic_slope: float
    """That times 3."""
    tail: tuple[float, ...]
    """Of u^0, u^1, … with u = (a - 4) / (a + 4): exp(a^2 / 2) (1 + 2 a) times the probability above a >= 0."""
    erf: tuple[float, ...]
    """Of x^0, x^2, …: erf(x) / x - 1 for |x| < 1."""


NORMAL_LARGEST = 40.0
"""Stands for every larger |x|: the probability above it rounds to +0."""

EXPM1_LOWEST = -40.0
"""Stands for every smaller argument: the result rounds to -1."""

EXP2_LARGEST = 2000.0
"""Stands for every larger |x|: the result is infinite, or rounds to +0."""

TANH_LARGEST = 20.0
"""Stands for every larger |x|: the result rounds to 1."""

NORMAL = {
    "float32": NormalConstants(
        root_two=float.fromhex("0x1.6a09e6p+0"),
        density=float.fromhex("0x1.988454p-2"),
        gelu_slope=float.fromhex("0x1.988454p+0"),
        gelu_cubic=float.fromhex("0x1.2444f2p-4"),
        gelu_cubic_slope=float.fromhex("0x1.b6676cp-3"),
        tail=_hex(
            "0x1.b30b54p-1",
            "-0x1.78fbc4p-6",
            "-0x1.8ac822p-4",
            "0x1.080092p-3",
            "-0x1.8612e4p-4",
            "0x1.6ba138p-5",
            "-0x1.5bee3ep-7",
            "-0x1.643696p-10",
            "0x1.b5cdfep-10",
            "0x1.f8b62ap-14",
            "-0x1.63b316p-14",
        ),
        erf=_hex(
            "0x1.06eba8p-3",
            "-0x1.81273ep-2",
            "0x1.ce2ce6p-4",
            "-0x1.b7f71ap-6",
            "0x1.53f224p-8",
            "-0x1.a3515ep-11",
            "0x1.4771fep-14",
        ),
    ),
    "float64": NormalConstants(
        root_two=float.fromhex("0x1.6a09e667f3bcdp+0"),
        density=float.fromhex("0x1.9884533d43651p-2"),
        gelu_slope=float.fromhex("0x1.9884533d43651p+0"),
        gelu_cubic=float.fromhex("0x1.2444f2a4d8b4bp-4"),
        gelu_cubic_slope=float.fromhex("0x1.b6676bf7450f0p-3"),
        tail=_hex(
            "0x1.b30b52fe27787p-1",
            "-0x1.78fbb7ec2d8fdp-6",
            "-0x1.8ac5bd763612cp-4",
            "0x1.0800fd0f640b5p-3",
            "-0x1.862fda1bf81dcp-4",
            "0x1.6b6ea911ebca7p-5",
            "-0x1.5877b9adc6d70p-7",
            "-0x1.3d35c1984c5a7p-10",
            "0x1.9d6539897648cp-10",
            "-0x1.2c888ae17380cp-13",
            "-0x1.ac8f9bac7a6a0p-13",
            "0x1.3da8bb756c716p-15",
            "0x1.08b09bb56ab92p-15",
            "-0x1.94e5f372381b5p-18",
            "-0x1.8a666693dc609p-18",
            "0x1.42de7620c6f78p-21",
            "0x1.3cc487151b74fp-20",
            "0x1.d504da3ddcfabp-25",
            "-0x1.c6105929cc924p-23",
            "-0x1.923ab7e3fadbap-25",
            "0x1.85b9ac35e2820p-26",
            "0x1.4837f1a619100p-27",
            "0x1.0cd2288d70edap-31",
        ),
        erf=_hex(
            "0x1.06eba8214db68p-3",
            "-0x1.812746b03799dp-2",
            "0x1.ce2f21a03f8b2p-4",
            "-0x1.b82ce311a93f8p-6",
            "0x1.565bcceecd8fcp-8",
            "-0x1.c02daeb4602c7p-11",
            "0x1.f9a296630b69cp-14",
            "-0x1.f4c8290321676p-17",
            "0x1.b96b11530ec3ap-20",
            "-0x1.5b8a7d425423ep-23",
            "0x1.d3ce893499b7ep-27",
            "-0x1.a20bda4c8bb69p-31",
        ),
    ),
}


class CircularConstants(NamedTuple):
    """The numbers of sin and cos, which are computed in float64 for every dtype; derived by `docs/polynomials.py`."""

    two_over_pi: float
    magic: float
    """1.5 * 2^52: adding it leaves the rounded integer in the low bits of the sum."""
    half_pi: tuple[float, float, float]
    """pi / 2 as the sum of three float64."""
    small: float
    """Below it in magnitude an argument is reduced by multiplications, from it on by integers."""
    two_over_pi_words: tuple[int, ...]
    """64 zeros and the first bits of 2 / pi behind the point, in words of 64 bits."""
    sin: tuple[float, ...]
    """Of r^0, r^2, …: (sin(r) / r - 1) / r^2 for |r| <= pi / 4."""
    cos: tuple[float, ...]
    """Of r^0, r^2, …: (cos(r) - 1 + r^2 / 2) / r^4 for |r| <= pi / 4."""


CIRCULAR = CircularConstants(
    two_over_pi=float.fromhex("0x1.45f306dc9c883p-1"),
    magic=float.fromhex("0x1.8p+52"),
    half_pi=(
        float.fromhex("0x1.921fb54442d18p+0"),
        float.fromhex("0x1.1a62633145c07p-54"),
        float.fromhex("-0x1.f1976b7ed8fb8p-110"),
    ),
    small=2.0**20,
    two_over_pi_words=(
        0x0000000000000000,
        0xA2F9836E4E441529,
        0xFC2757D1F534DDC0,
        0xDB6295993C439041,
        0xFE5163ABDEBBC561,
        0xB7246E3A424DD2E0,
        0x06492EEA09D1921C,
        0xFE1DEB1CB129A73E,
        0xE88235F52EBB4484,
        0xE99C7026B45F7E41,
        0x3991D639835339F4,
        0x9C845F8BBDF9283B,
        0x1FF897FFDE05980F,
        0xEF2F118B5A0A6D1F,
        0x6D367ECF27CB09B7,
        0x4F463F669E5FEA2D,
        0x7527BAC7EBE5F17B,
        0x3D0739F78A5292EA,
        0x6BFB5FB11F8D5D08,
        0x56033046FC7B6BAB,
    ),
    sin=_hex(
        "-0x1.5555555555548p-3",
        "0x1.111111110f730p-7",
        "-0x1.a01a019be9216p-13",
        "0x1.71de35552afebp-19",
        "-0x1.ae5e4b835937cp-26",
        "0x1.5d8b55568c9acp-33",
    ),
    cos=_hex(
        "0x1.555555555554bp-5",
        "-0x1.6c16c16c15015p-10",
        "0x1.a01a019c8f24ep-16",
        "-0x1.27e4f7f190abbp-22",
        "0x1.1ee9dbce5241ap-29",
        "-0x1.8fa6840eef4e2p-37",
    ),
)
