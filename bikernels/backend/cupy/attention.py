"""Attention of few queries: chooses attention_short.cu or a team of attention.cu, and fills the kernel's parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...contract import ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import AttentionSpec
from ...views import Device
from .. import AttentionLaunch
from .compile import Kernel
from .launch import ADDRESS, FIRST_WITH_CLUSTERS, GPU, MAX_GRID, Launch, gpu, load, shaped
from .parameters import ATTENTION, C_TYPE, DTYPE_CODE, SHORT_ATTENTION, divisor

DTYPES = ("bfloat16", "float16", "float32")
ROWS = (4, 2, 1)
"""Queries of a team, which share what it reads of keys and values. With more, multiprocessors take turns less."""
MOST_QUERIES = 16
"""Of a head; with more, tiles of a product share more of what they read."""
MOST_COLUMNS = 256
"""Elements of a key and of a value."""
CTAS = (1, 2, 4, 8)
"""Of a team; more than one are a cluster, and of 8 every GPU with clusters has some."""

_THREADS, _WARPS, _STAGES = 128, 4, 4
_KEY_BYTES = 80
"""Of each of a tile's keys a stage has 4 vectors, and room for one that keeps those of threads apart."""
_STAGE_BYTES = _THREADS * _KEY_BYTES
_FEWEST_KEYS, _MOST_KEYS = 16, 256
"""Of a tile of values."""
_FEWEST_COLUMNS = 16
"""Of a CTA, which has a power of 2."""
_PADDING = 4
SHORT_KEYS = SUM_CHUNK
"""Of one sum's chunk, as attention_short.cu has it; fewer if they and their values do not fit a CTA's shared memory."""
FIRST_WITH_REDUX = (8, 0)

_STEP, _ALIGNMENT = 8, 16
_OTHER_BYTES = 1536
"""Of shared memory that a CTA takes besides: what the kernel declares, and what the driver keeps."""
_RESIDENT_THREADS = 512
"""Of a multiprocessor, which has the registers for them by the kernel's launch bounds."""
_KEYS_OF_CTA = 128
"""A CTA with fewer would save less than the team's meetings take."""


class Plan(NamedTuple):
    """How a problem is spread over the GPU; attention.cu says what the words mean."""

    rows: int
    ctas: int
    row_teams: int
    teams: int
    slice: int
    tile: int
    stage_bytes: int
    is_apart: bool
    shared_bytes: int

    @property
    def grid(self) -> int:
        return self.teams * self.ctas


def kernel(dtype: str, rows: int) -> Kernel:
    """The kernel of attention.cu."""
    return Kernel("attention.cu", (("ELEMENT", C_TYPE[dtype]), ("ROWS", rows)))


def kernels() -> Iterator[Kernel]:
    """Every kernel of attention."""
    for dtype in DTYPES:
        for rows in ROWS:
            yield kernel(dtype, rows)
            yield short_kernel(dtype, rows)


def takes(spec: AttentionSpec) -> bool:
    """Whether the kernel computes this, for a team that fits."""
    _, _, queries, width = spec.query.shape
    return (
        spec.query.dtype in DTYPES
        and (spec.mask is None or spec.mask.dtype in ("bool", "float32", spec.query.dtype))
        and 1 <= queries <= MOST_QUERIES
        and 1 <= width <= MOST_COLUMNS
        and 1 <= spec.value.shape[3] <= MOST_COLUMNS
        and 0 < spec.key.shape[2] < 2**31 - SUM_CHUNK
        and min(spec.query.shape[:2]) > 0
    )


def choose(spec: AttentionSpec, properties: GPU) -> Plan | None:
    """The team; None if none has the memory for so many keys."""
    batch, heads, queries, _ = spec.query.shape
    groups, keys = spec.key.shape[1:3]
    together = heads // groups * queries
    for rows in ROWS:
        if rows >= 2 * together:
            continue  # half of them are as many as there are
        found: Plan | None = None
        for ctas in CTAS:
            if ctas > 1 and properties.compute_capability < FIRST_WITH_CLUSTERS:
                break
            plan = _plan(spec, rows, ctas, batch * groups * -(-together // rows), properties)
            if plan.shared_bytes > properties.shared_bytes or plan.grid > MAX_GRID:
                continue
            if found is not None and not _is_better(found, keys, spec.value.shape[3], properties):
                break
            found = plan
        if found is not None:
            return found
    return None


def _is_better(plan: Plan, keys: int, columns: int, properties: GPU) -> bool:
    """Whether twice the CTAs would be quicker."""
    ctas = 2 * plan.ctas
    return plan.grid < properties.multiprocessors and keys >= ctas * _KEYS_OF_CTA and columns >= ctas * _FEWEST_COLUMNS


def _plan(spec: AttentionSpec, rows: int, ctas: int, teams: int, properties: GPU) -> Plan:
    heads, queries, width = spec.query.shape[1:]
    groups, keys = spec.key.shape[1:3]
    size = ITEMSIZE[spec.query.dtype]
    of_slice = max(_FEWEST_COLUMNS, 1 << (-(-spec.value.shape[3] // ctas) - 1).bit_length())
    tile = _MOST_KEYS
    while tile > _FEWEST_KEYS and (tile * of_slice * size > _STAGE_BYTES or tile >= 2 * keys):
        tile //= 2
    stage_bytes = max(_STAGE_BYTES, tile * of_slice * size)
    depth = 4 * 16 // size
    places = rows * -(-keys // SUM_CHUNK) * ctas
    floats = (
        rows * -(-width // depth) * depth  # queries
        + rows * (-(-keys // SUM_LANES) * (SUM_LANES // ctas) + _PADDING)  # weights
        + (2 * rows * (tile + _PADDING) if ctas > 1 else 0)  # others' weights
        + ctas * _WARPS * rows  # maxima
        + 2 * places  # sums and counts
        + 3 * rows  # maximum, divisor and its reciprocal
    )
    row_teams = -(-heads // groups * queries // rows)
    ring, rest = _STAGES * stage_bytes, 4 * floats
    is_apart = teams * ctas <= properties.multiprocessors and 2 * ring + rest <= properties.shared_bytes
    shared_bytes = (1 + is_apart) * ring + rest
    return Plan(rows, ctas, row_teams, teams, of_slice, tile, stage_bytes, is_apart, shared_bytes)


def parameters_of(spec: AttentionSpec, plan: Plan) -> Any:
    """The struct of attention.cu."""
    heads, queries, width = spec.query.shape[1:]
    groups, keys = spec.key.shape[1:3]
    parameters = np.zeros((), ATTENTION)
    parameters["keys"], parameters["width"], parameters["columns"] = keys, width, spec.value.shape[3]
    parameters["groups"], parameters["queries"] = divisor(groups), divisor(queries)
    parameters["row_teams"], parameters["sharing"] = divisor(plan.row_teams), heads // groups
    parameters["slice"], parameters["tile"] = plan.slice, plan.tile
    parameters["stage_bytes"], parameters["is_causal"] = plan.stage_bytes, spec.is_causal
    parameters["is_apart"] = plan.is_apart
    parameters["mask_dtype"] = -1 if spec.mask is None else DTYPE_CODE[spec.mask.dtype]
    parameters["query_factor"], parameters["key_factor"] = spec.query_factor, spec.key_factor
    for name in ("query", "key", "value", "out"):
        parameters[f"{name}_stride"] = getattr(spec, name).strides
    if spec.mask is not None:
        parameters["mask_stride"] = spec.mask.strides
    return parameters


def _general(spec: AttentionSpec, plan: Plan, device: Device) -> Launch:
    """A launch of attention.cu, given the addresses of out, query, key, value, and the mask, if there is one."""
    addresses = (ADDRESS,) * 4
    return shaped(
        load(kernel(spec.query.dtype, plan.rows), "attention", device.index, plan.shared_bytes),
        plan.grid,
        _THREADS,
        plan.shared_bytes,
        (parameters_of(spec, plan), *addresses, np.uint64(0) if spec.mask is None else ADDRESS),
        cluster=plan.ctas,
        overlapping=gpu(device.index).compute_capability >= FIRST_WITH_CLUSTERS,
    )


# --------------------------------------------------------------------------------------------------------- short chains


class ShortPlan(NamedTuple):
    """How a problem is spread over CTAs of attention_short.cu."""

    rows: int
    row_teams: int
    grid: int
    threads: int
    padded: int
    shared_bytes: int


def short_kernel(dtype: str, rows: int) -> Kernel:
    """The kernel of attention_short.cu."""
    return Kernel("attention_short.cu", (("ELEMENT", C_TYPE[dtype]), ("ROWS", rows)))


def choose_short(spec: AttentionSpec, properties: GPU) -> ShortPlan | None:
    """The CTAs, which are all there at once; None where it takes attention.cu."""
    if not _takes_short(spec) or properties.compute_capability < FIRST_WITH_REDUX:
        return None
    heads, queries = spec.query.shape[1:3]
    together = heads // spec.key.shape[1] * queries
    plan: ShortPlan | None = None
    for rows in reversed(ROWS):  # as few in a CTA as that allows
        if rows >= 2 * together:
            break
        plan = short_plan(spec, rows)
        if plan.grid <= properties.multiprocessors:
            break
    if plan is None:
        return None
    memory = plan.shared_bytes + _OTHER_BYTES
    resident = min(properties.shared_bytes // memory, _RESIDENT_THREADS // plan.threads)
    return plan if plan.grid <= properties.multiprocessors * resident else None


def _takes_short(spec: AttentionSpec) -> bool:
    """Whether attention_short.cu computes this, of keys and values that lie by vectors."""
    vector = 16 // ITEMSIZE[spec.query.dtype]
    return (
        spec.mask is None
        and not spec.is_causal
        and spec.key.shape[2] <= SHORT_KEYS
        and spec.key.strides[3] == spec.value.strides[3] == 1
        and all(step % vector == 0 for one in (spec.key, spec.value) for step in (*one.strides[:3], one.shape[3]))
    )


def short_plan(spec: AttentionSpec, rows: int) -> ShortPlan:
    """The plan with so many queries in a CTA."""
    batch, heads, queries, width = spec.query.shape
    (groups, keys), columns = spec.key.shape[1:3], spec.value.shape[3]
    size = ITEMSIZE[spec.query.dtype]
    row_teams, padded = -(-heads // groups * queries // rows), -(-keys // _STEP) * _STEP
    of_keys, of_values = keys * (width * size + 16), (padded + _STEP) * columns * size
    shared_bytes = of_keys + of_values + 4 * rows * (width + padded + _STEP)
    threads = SUM_LANES // 2 if keys <= SUM_LANES // 2 else SUM_LANES
    return ShortPlan(rows, row_teams, batch * groups * row_teams, threads, padded, shared_bytes)


def short_parameters_of(spec: AttentionSpec, plan: ShortPlan) -> Any:
    """The struct of attention_short.cu."""
    heads, queries, width = spec.query.shape[1:]
    (groups, keys), columns = spec.key.shape[1:3], spec.value.shape[3]
    vector = 16 // ITEMSIZE[spec.query.dtype]
    parameters = np.zeros((), SHORT_ATTENTION)
    parameters["groups"], parameters["queries"] = divisor(groups), divisor(queries)
    parameters["row_teams"], parameters["sharing"] = divisor(plan.row_teams), heads // groups
    parameters["keys"], parameters["padded"] = keys, plan.padded
    parameters["width"], parameters["columns"] = width, columns
    parameters["key_shift"] = (width // vector - 1).bit_length()
    parameters["value_shift"] = (columns // vector - 1).bit_length()
    parameters["query_factor"], parameters["key_factor"] = spec.query_factor, spec.key_factor
    for name in ("query", "key", "value", "out"):
        parameters[f"{name}_stride"] = getattr(spec, name).strides[:3]
    parameters["query_along"], parameters["out_along"] = spec.query.strides[3], spec.out.strides[3]
    return parameters


def _short(spec: AttentionSpec, plan: ShortPlan, device: Device) -> Launch:
    """A launch of attention_short.cu, given the addresses of out, query, key and value, the latter two of vectors."""
    return shaped(
        load(short_kernel(spec.query.dtype, plan.rows), "attention", device.index, plan.shared_bytes),
        plan.grid,
        plan.threads,
        plan.shared_bytes,
        (short_parameters_of(spec, plan), *(ADDRESS,) * 4),
        overlapping=gpu(device.index).compute_capability >= FIRST_WITH_CLUSTERS,
    )


def prepare(spec: AttentionSpec, device: Device) -> AttentionLaunch | None:
    """See `bikernels.backend.Backend.prepare_attention`."""
    properties = gpu(device.index)
    plan = choose(spec, properties) if takes(spec) else None
    if plan is None:
        return None
    short_plan = choose_short(spec, properties)
    if short_plan is None:
        return _general(spec, plan, device)
    short, general = _short(spec, short_plan, device), functools.cache(functools.partial(_general, spec, plan, device))

    def launch(stream: int, out: int, query: int, key: int, value: int, /, *_: int) -> None:
        (general() if (key | value) % _ALIGNMENT else short)(stream, out, query, key, value)

    return launch
