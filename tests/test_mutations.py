"""The suite can fail: each small departure from the contract is noticed by the cases that every backend must pass."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bikernels import contract, reference

from .cases import (
    NORMS,
    Case,
    assert_same_bits,
    backward_cases,
    draw,
    long_matmul_cases,
    matmul_cases,
    norm_cases,
    reduction_cases,
)


def noticed(cases: Iterator[Case], expected: dict[str, np.ndarray]) -> list[str]:
    """The names of the cases whose bytes are no longer those computed before the mutation."""
    names = []
    for case in cases:
        try:
            assert_same_bits(case.expected(), expected[case.name])
        except AssertionError:
            names.append(case.name)
    return names


def products(arithmetic: str) -> Iterator[Case]:
    for cases in (matmul_cases, long_matmul_cases):
        yield from (case for case in cases() if case.options.get("arithmetic", arithmetic) == arithmetic)


def changed(arithmetic: str, **changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    mutant = contract.ARITHMETIC[arithmetic]._replace(**changes)
    return lambda patch: patch.setitem(contract.ARITHMETIC, arithmetic, mutant)


def patched(function: str, replacement: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(reference, function, replacement)


original_fold, original_step, original_fma = reference.fold, reference._tensor_core_step, reference.fma
original_tree, original_write = reference.tree_sum, reference.write


def fold_with_moved_boundary(a: np.ndarray, b: np.ndarray, arithmetic: str) -> np.ndarray:
    """One product that is zero in front moves every group's boundary by one."""
    return original_fold(np.pad(a, ((0, 0), (1, 0))), np.pad(b, ((1, 0), (0, 0))), arithmetic)


def fold_without_last_zero(a: np.ndarray, b: np.ndarray, arithmetic: str) -> np.ndarray:
    """The chain without `+ 0` at its end."""
    acc = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    for k in range(a.shape[1]):
        acc = original_fma(a[:, k, None], b[None, k, :], acc)
    return acc


def fma_in_two_roundings(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return a * b + c


def sum_in_order(rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        acc = np.zeros(len(rows), rows.dtype)
        for i in range(rows.shape[1]):
            acc = acc + rows[:, i]
    return acc


def step_that_rounds_to_nearest(*arguments: Any) -> np.ndarray:
    acc, a, b = arguments[:3]
    with np.errstate(all="ignore"):
        return (acc + a @ b).astype(np.float32).astype(np.float64)


def write_with_negative_zero(x: np.ndarray, dtype: str) -> np.ndarray:
    return original_write(np.where(x == 0, -x, x), dtype)


def write_with_other_nan(x: np.ndarray, dtype: str) -> np.ndarray:
    result = original_write(x, dtype)
    nan = np.isnan(result)
    return np.where(nan, -result, result)


MATMUL_MUTATIONS = {
    "tc16f25: group of 8": ("tc16f25", changed("tc16f25", group=8)),
    "tc16f25: group of 32": ("tc16f25", changed("tc16f25", group=32)),
    "tc16f25: 24 fraction bits": ("tc16f25", changed("tc16f25", fraction_bits=24)),
    "tc16f25: 26 fraction bits": ("tc16f25", changed("tc16f25", fraction_bits=26)),
    "tc16f25: floor": ("tc16f25", changed("tc16f25", floor=-150)),
    "tc16f25: moved boundary": ("tc16f25", patched("fold", fold_with_moved_boundary)),
    "tc16f25: rounds to nearest": ("tc16f25", patched("_tensor_core_step", step_that_rounds_to_nearest)),
    "fma32: fma split in two": ("fma32", patched("fma", fma_in_two_roundings)),
    "fma64: fma split in two": ("fma64", patched("fma", fma_in_two_roundings)),
    "fma32: -0 for +0": ("fma32", patched("write", write_with_negative_zero)),
    "tc16f25: -0 for +0": ("tc16f25", patched("write", write_with_negative_zero)),
    "fma32: another NaN": ("fma32", patched("write", write_with_other_nan)),
}


@pytest.mark.parametrize("mutation", MATMUL_MUTATIONS)
def test_matmul_cases_notice(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic, apply = MATMUL_MUTATIONS[mutation]
    expected = {case.name: case.expected() for case in products(arithmetic)}
    assert not noticed(products(arithmetic), expected)
    apply(monkeypatch)
    assert noticed(products(arithmetic), expected)


def test_underflow_cases_notice_the_missing_last_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases() -> Iterator[Case]:
        return (case for case in matmul_cases() if "underflow" in case.name)

    expected = {case.name: case.expected() for case in cases()}
    monkeypatch.setattr(reference, "fold", fold_without_last_zero)
    assert noticed(cases(), expected) == ["float32-underflow-last", "float64-underflow-last"]


REDUCTION_MUTATIONS = {
    "lanes": lambda patch: patch.setattr(contract, "SUM_LANES", 128),
    "chunk": lambda patch: patch.setattr(contract, "SUM_CHUNK", 4096),
    "in order": patched("tree_sum", sum_in_order),
    "shifted by one": patched("tree_sum", lambda rows: original_tree(np.pad(rows, ((0, 0), (1, 0))))),
    "-0 for +0": patched("write", write_with_negative_zero),
    "another NaN": patched("write", write_with_other_nan),
}


@functools.cache
def reductions() -> tuple[list[Case], dict[str, np.ndarray]]:
    """The cases, and what they expect; made before a mutation, since the reference has a part in the inputs."""
    every = itertools.chain(reduction_cases(), norm_cases(), backward_cases())
    cases = [case for case in every if "float64" not in case.name]  # the reference is slow there
    return cases, {case.name: case.expected() for case in cases}


@pytest.mark.parametrize("mutation", REDUCTION_MUTATIONS)
def test_reduction_cases_notice(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, expected = reductions()
    REDUCTION_MUTATIONS[mutation](monkeypatch)
    operations = {name.partition("-")[0] for name in noticed(iter(cases), expected)}
    assert operations == {case.operation for case in cases} or (operations and mutation == "-0 for +0")


WITH_FMA = {
    *("softmax", "log_softmax", "logsumexp", "layer_norm"),
    *("log_softmax_backward", "rms_norm_backward", "layer_norm_backward"),
}


def test_reduction_cases_notice_a_split_fma(monkeypatch: pytest.MonkeyPatch) -> None:
    cases, expected = reductions()
    monkeypatch.setattr(reference, "fma", fma_in_two_roundings)
    assert {name.partition("-")[0] for name in noticed(iter(cases), expected)} == WITH_FMA


def variance_of_squares(rows: np.ndarray, correction: float) -> np.ndarray:
    """One pass: the mean of the squares less the square of the mean."""
    total, squares = original_tree(rows), original_tree(rows * rows)
    n = rows.dtype.type(rows.shape[1])
    return (squares - total * total / n) / rows.dtype.type(max(0.0, rows.shape[1] - correction))


def variance_with_padding(rows: np.ndarray, correction: float) -> np.ndarray:
    """Elements that a chunk does not have count with the square of -mean."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % contract.SUM_CHUNK)))
    y = padded - (original_tree(rows) / rows.dtype.type(rows.shape[1]))[:, None]
    return original_tree(y * y) / rows.dtype.type(max(0.0, rows.shape[1] - correction))


def root_in_one_rounding(mean_square: np.ndarray, eps: float | None) -> np.ndarray:
    """1 / sqrt(v + eps) in float64, rounded once."""
    eps = np.finfo(mean_square.dtype).eps if eps is None else mean_square.dtype.type(eps)
    return (1 / np.sqrt(mean_square.astype(np.longdouble) + eps)).astype(mean_square.dtype)


@pytest.mark.parametrize(
    ("function", "mutant", "operations"),
    [
        ("_variance", variance_of_squares, {"var", "std", "layer_norm"}),
        ("_variance", variance_with_padding, {"var", "std", "layer_norm"}),
        ("_reciprocal_root", root_in_one_rounding, set(NORMS)),
    ],
)
def test_cases_notice_another_formula(
    function: str, mutant: Callable[..., Any], operations: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, expected = reductions()
    monkeypatch.setattr(reference, function, mutant)
    with np.errstate(all="ignore"):
        assert {name.partition("-")[0] for name in noticed(iter(cases), expected)} == operations


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["group of 8", "moved boundary"])
def test_tensor_cores_notice(backend: Any, change: str, rng: np.random.Generator) -> None:
    """On hardware: two k8 steps for one k16, or a boundary moved by one product, give other bits."""
    if backend.name == "cpu" or backend.arithmetic["bfloat16"] != "tc16f25":
        pytest.skip("needs a GPU that computes tc16f25")
    a, b = draw(rng, (64, 512), "bfloat16"), draw(rng, (512, 64), "bfloat16")
    if change == "moved boundary":
        mutant = backend.call("matmul", np.pad(a, ((0, 0), (1, 0))), np.pad(b, ((1, 0), (0, 0))), dtype="float32")
    else:
        wide_a, wide_b = np.zeros((64, 1024), a.dtype), np.zeros((1024, 64), b.dtype)
        where = np.arange(512) + np.arange(512) // 8 * 8  # every group of 16 holds 8 products and 8 zeros
        wide_a[:, where], wide_b[where] = a, b
        mutant = backend.call("matmul", wide_a, wide_b, dtype="float32")
    with pytest.raises(AssertionError):
        assert_same_bits(mutant, backend.call("matmul", a, b, dtype="float32"))
