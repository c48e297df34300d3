"""What the public functions accept, in what they answer, and what they refuse with which words."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bikernels
from bikernels import contract, reference
from bikernels.backend import get
from bikernels.dtypes import NUMPY_DTYPE

from .cases import FLOATS, assert_same_bits, draw


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, NUMPY_DTYPE[dtype])


# ------------------------------------------------------------------------------------------------------ the package


def test_contract_version() -> None:
    assert bikernels.contract_version == contract.VERSION == 1


@pytest.mark.parametrize("module", ["bikernels", "bikernels.backend.cpu", "bikernels.reference"])
def test_core_imports_neither_torch_nor_a_gpu_framework(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'cupy', 'cuda') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_backends_says_what_is_there_and_why_not() -> None:
    status = bikernels.backends()
    assert list(status) == ["cpu", "cupy", "numba"]
    assert status["cpu"].available
    assert status["cpu"].chosen_for == ("cpu",)
    assert status["cpu"].arithmetic == contract.PORTABLE_ARITHMETIC
    for one in status.values():
        assert one.available == (one.reason is None)


# --------------------------------------------------------------------------------------------------- kinds of arrays


class Exporter:
    """An object that is an array through DLPack only."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class OldExporter(Exporter):
    """An exporter from before DLPack 1.0."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


@pytest.mark.parametrize("exporter", [Exporter, OldExporter])
def test_dlpack_objects_are_answered_in_numpy(exporter: type[Exporter], rng: np.random.Generator) -> None:
    for dtype in ("float16", "float32", "float64"):
        a, b = draw(rng, (4, 6), dtype), draw(rng, (6, 5), dtype)
        expected = bikernels.matmul(a, b)
        actual = bikernels.matmul(exporter(a), exporter(b))
        assert type(actual) is np.ndarray
        assert_same_bits(actual, expected)
        transposed = bikernels.matmul(exporter(b.T), exporter(a[::-1, ::-1].T))
        assert_same_bits(transposed, bikernels.matmul(b.T, a[::-1, ::-1].T))


def test_torch_tensors_are_answered_in_numpy() -> None:
    torch = pytest.importorskip("torch")
    a, b = torch.randn(4, 6).bfloat16(), torch.randn(6, 5).bfloat16()
    actual = bikernels.matmul(a, b)
    assert actual.dtype == ml_dtypes.bfloat16
    bits = [x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for x in (a, b)]
    assert_same_bits(actual, bikernels.matmul(*bits))


def test_numpy_scalars_are_arrays_without_dimensions() -> None:
    assert bikernels.mean(np.float32(3)) == 3
    assert (bikernels.addmm(np.float32(2), ones(2, 3), ones(3, 2)) == 5).all()
    with pytest.raises(ValueError, match="read-only"):
        bikernels.mean(ones(3), out=np.float32(0))


def test_inputs_are_not_copied() -> None:
    a = np.zeros((2000, 2000), np.float32)
    view = bikernels.views.FormView(*bikernels.kinds.facts_of(a[::-2, 3::5], "a"))
    assert view.pointer == a[::-2, 3::5].ctypes.data
    assert view.strides == (-4000, 5)


def test_views_need_out(rng: np.random.Generator) -> None:
    a, out = draw(rng, (4, 4), "float32"), np.empty((4, 4), np.float32)
    views = [bikernels.View(x.ctypes.data, "float32", (4, 4), (4, 1), owner=x) for x in (a, out)]
    assert bikernels.matmul(views[0], views[0], out=views[1]) is views[1]
    assert_same_bits(out, bikernels.matmul(a, a))
    with pytest.raises(TypeError, match="out is required"):
        bikernels.matmul(views[0], views[0])


@pytest.mark.gpu
def test_numba_device_arrays(backend: Any, rng: np.random.Generator) -> None:
    if backend.name == "cpu":
        pytest.skip("Numba device arrays are for GPUs")
    cuda = pytest.importorskip("numba.cuda")
    for dtype in ("float16", "float32", "float64"):
        a, b = draw(rng, (4, 6), dtype), draw(rng, (6, 5), dtype)
        actual = bikernels.matmul(cuda.to_device(a), cuda.to_device(b), backend=backend.name)
        assert cuda.is_cuda_array(actual)
        assert type(actual).__module__.startswith("numba")
        expected = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
        assert_same_bits(actual.copy_to_host(), expected)
        mean = bikernels.mean(cuda.to_device(a), backend=backend.name)
        assert_same_bits(mean.copy_to_host().reshape(()), reference.mean(a))


@pytest.mark.gpu
def test_torch_cuda_tensors_are_answered_in_cupy(backend: Any) -> None:
    torch = pytest.importorskip("torch")
    if backend.name == "cpu" or not torch.cuda.is_available():
        pytest.skip("needs a GPU in both")
    a, b = torch.randn(4, 6, device="cuda").bfloat16(), torch.randn(6, 5, device="cuda").bfloat16()
    actual = bikernels.matmul(a, b, backend=backend.name)
    assert isinstance(actual, backend.xp.ndarray)
    host = [x.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16) for x in (a, b)]
    assert_same_bits(backend.get(actual), reference.matmul(*host, arithmetic=backend.arithmetic["bfloat16"]))


# ---------------------------------------------------------------------------------------------------- prepared calls


def address(x: np.ndarray) -> int:
    return int(x.ctypes.data)


def test_prepared_calls(rng: np.random.Generator) -> None:
    def operands() -> tuple[np.ndarray, ...]:
        return tuple(draw(rng, shape, "float32") for shape in ((5, 3), (5, 7), (7, 3)))

    first, out = operands(), ones(5, 3)
    launch = bikernels.prepare(bikernels.addmm, *first, out=out, alpha=0.3, beta=-2)
    assert (out == 1).all()  # nothing has been computed
    for c, a, b in (first, operands()):
        launch(0, address(out), address(c), address(a), address(b))
        assert_same_bits(out, bikernels.addmm(c, a, b, alpha=0.3, beta=-2))


def test_prepared_calls_of_several_results_and_of_operands_that_are_left_out(rng: np.random.Generator) -> None:
    x, bias = draw(rng, (4, 9), "float32"), draw(rng, (9,), "float32")
    expected = bikernels.layer_norm_with_statistics(x, None, bias)
    out = tuple(np.empty_like(one) for one in expected)
    launch = bikernels.prepare(bikernels.layer_norm_with_statistics, x, None, bias, out=out)
    launch(0, *map(address, (*out, x, bias)))
    for one, wanted in zip(out, expected, strict=True):
        assert_same_bits(one, wanted)
    (grad, y), dx = (draw(rng, (4, 9), "float32") for _ in range(2)), np.empty_like(x)
    launch = bikernels.prepare(bikernels.softmax_backward, grad, y, out=dx)  # another order than the operation's own
    launch(0, address(dx), address(grad), address(y))
    assert_same_bits(dx, bikernels.softmax_backward(grad, y))


def test_prepared_calls_keep_the_settings(rng: np.random.Generator) -> None:
    a, b, out = draw(rng, (8, 4096), "bfloat16"), draw(rng, (4096, 8), "bfloat16"), ones(8, 8)
    with bikernels.use_arithmetic("tc16f25"):
        launch = bikernels.prepare(bikernels.matmul, a, b, out=out, dtype="float32")
    launch(0, address(out), address(a), address(b))
    assert_same_bits(out, bikernels.matmul(a, b, dtype="float32", arithmetic="tc16f25"))
    assert not np.array_equal(out, bikernels.matmul(a, b, dtype="float32"))


def test_what_cannot_be_prepared() -> None:
    a, b = ones(2, 3), ones(4, 5)
    with pytest.raises(ValueError, match="do not match"):
        bikernels.prepare(bikernels.matmul, a, b, out=ones(2, 5))
    with pytest.raises(ValueError, match="out has shape"):
        bikernels.prepare(bikernels.matmul, a, ones(3, 5), out=ones(5, 5))
    with pytest.raises(ValueError, match="given twice"):
        bikernels.prepare(bikernels.matmul, b, b, out=ones(4, 4))
    empty = ones(0, 5)
    bikernels.prepare(bikernels.matmul, ones(0, 4), b, out=empty)(0, address(empty), 0, address(b))


# ---------------------------------------------------------------------------------------------------------- refusals

PRODUCT_ERRORS = {
    "inner sizes": (lambda: bikernels.matmul(ones(2, 3), ones(4, 5)), ValueError, r"a .*\(2, 3\).*b .*\(4, 5\)"),
    "batch": (lambda: bikernels.matmul(ones(2, 3, 3), ones(5, 3, 3)), ValueError, "batch"),
    "0-d": (lambda: bikernels.matmul(ones(), ones(3)), ValueError, "a is 0-dimensional"),
    "two dtypes": (lambda: bikernels.matmul(ones(2, 2), ones(2, 2, dtype="float16")), TypeError, "float32.*float16"),
    "integers": (lambda: bikernels.matmul(np.ones((2, 2), int), np.ones((2, 2), int)), TypeError, "a is int64"),
    "complex": (lambda: bikernels.matmul(np.ones((2, 2), complex), ones(2, 2)), TypeError, "a: .*complex128"),
    "float8": (
        lambda: bikernels.matmul(np.ones((2, 2), ml_dtypes.float8_e4m3fn), ones(2, 2)),
        TypeError,
        "a: .*float8_e4m3fn",
    ),
    "byte order": (lambda: bikernels.matmul(np.ones((2, 2), ">f4"), ones(2, 2)), TypeError, "byte order"),
    "list": (lambda: bikernels.matmul([[1.0]], ones(1, 1)), TypeError, "a is of type list"),
    "masked": (lambda: bikernels.matmul(ones(1, 1), np.ma.ones((1, 1), np.float32)), TypeError, "b: .*masked"),
    "narrower": (lambda: bikernels.matmul(ones(2, 2), ones(2, 2), dtype="float16"), TypeError, "float16.*float32"),
    "integer dtype": (lambda: bikernels.matmul(ones(2, 2), ones(2, 2), dtype=np.int32), TypeError, "dtype is int32"),
    "addend shape": (lambda: bikernels.addmm(ones(3), ones(2, 2), ones(2, 2)), ValueError, r"c .*\(3,\)"),
    "addend larger": (lambda: bikernels.addmm(ones(4, 2, 2), ones(2, 2), ones(2, 2)), ValueError, "broadcast"),
    "addend dtype": (
        lambda: bikernels.addmm(ones(2, dtype="float64"), ones(2, 2), ones(2, 2)),
        TypeError,
        "c is float64",
    ),
    "alpha": (lambda: bikernels.addmm(ones(2), ones(2, 2), ones(2, 2), alpha=1j), TypeError, "alpha is 1j"),
    "alpha text": (lambda: bikernels.addmm(ones(2), ones(2, 2), ones(2, 2), alpha="a"), TypeError, "alpha is 'a'"),
    "alpha size": (lambda: bikernels.addmm(ones(2), ones(2, 2), ones(2, 2), alpha=10**400), ValueError, "alpha is too"),
    "no addend": (lambda: bikernels.addmm(None, ones(2, 2), ones(2, 2)), TypeError, "c is None.*matmul"),
    "arithmetic": (lambda: bikernels.matmul(ones(2, 2), ones(2, 2), arithmetic="tf32"), ValueError, "'tf32'.*'fma32'"),
    "class and dtype": (
        lambda: bikernels.matmul(ones(2, 2), ones(2, 2), arithmetic="tc16f25"),
        bikernels.ArithmeticUnsupportedError,
        "'tc16f25'.*float32.*'fma32'",
    ),
    "backend": (lambda: bikernels.matmul(ones(2, 2), ones(2, 2), backend="tpu"), ValueError, "'tpu'.*'cpu'"),
}

REDUCTION_ERRORS = {
    "axis": (lambda: bikernels.log_softmax(ones(2, 3), axis=2), np.exceptions.AxisError, "2"),
    "axis of a scalar": (lambda: bikernels.softmax(ones()), np.exceptions.AxisError, "-1"),
    "axis twice": (lambda: bikernels.mean(ones(2, 3), axis=(1, -1)), ValueError, "twice"),
    "axis array": (lambda: bikernels.mean(ones(2, 3), axis=np.array([0, 1])), TypeError, "axis is array"),
    "axis type": (lambda: bikernels.mean(ones(2, 3), axis=1.5), TypeError, "axis is 1.5"),
    "softmax axes": (lambda: bikernels.softmax(ones(2, 3), axis=(0, 1)), TypeError, "one integer"),
    "complex": (lambda: bikernels.mean(np.ones(3, complex)), TypeError, "x: .*complex128"),
    "dtype": (lambda: bikernels.mean(ones(3), dtype="complex64"), TypeError, "complex64"),
    "strings": (lambda: bikernels.mean(np.array(["a"])), TypeError, "x: "),
    "correction": (lambda: bikernels.var(ones(3), correction="a"), TypeError, "correction is 'a'"),
    "eps": (lambda: bikernels.layer_norm(ones(3), eps=None), TypeError, "eps is None"),
    "norm of no axis": (lambda: bikernels.rms_norm(ones(3), axis=None), TypeError, "axis is None"),
    "weight shape": (lambda: bikernels.rms_norm(ones(2, 3), ones(2)), ValueError, r"weight .*\(2,\).*\(3,\).*\(2, 3\)"),
    "weight dtype": (lambda: bikernels.rms_norm(ones(3), np.ones(3, int)), TypeError, "weight is int64"),
    "bias shape": (lambda: bikernels.layer_norm(ones(2, 3), None, ones(2, 3)), ValueError, r"bias .*\(2, 3\).*\(3,\)"),
    "weight list": (lambda: bikernels.rms_norm(ones(3), [1.0]), TypeError, "weight is of type list"),
    "gradient shape": (lambda: bikernels.softmax_backward(ones(3), ones(2, 3)), ValueError, r"grad .*\(3,\).*\(2, 3\)"),
    "gradient of integers": (lambda: bikernels.softmax_backward(ones(3), np.ones(3, int)), TypeError, "y is int64"),
    "statistics": (
        lambda: bikernels.rms_norm_backward(ones(2, 3), ones(2, 3), ones(2)),
        ValueError,
        r"rstd .*\(2,\).*\(2, 1\)",
    ),
    "results": (lambda: bikernels.rms_norm_with_statistics(ones(3), out=ones(3)), TypeError, "tuple of 2.*out, rstd"),
    "statistics dtype": (
        lambda: bikernels.rms_norm_with_statistics(ones(3), out=(ones(3), ones(1, dtype="float64"))),
        TypeError,
        "rstd is float64",
    ),
}


@pytest.mark.parametrize("name", PRODUCT_ERRORS | {f"reduction {name}": None for name in REDUCTION_ERRORS})
def test_bad_input(name: str) -> None:
    call, error, words = (PRODUCT_ERRORS | {f"reduction {k}": v for k, v in REDUCTION_ERRORS.items()})[name]
    with pytest.raises(error, match=words):
        call()


def bad_outs() -> dict[str, tuple[np.ndarray, type[Exception], str]]:
    read_only = ones(3, 3)
    read_only.flags.writeable = False
    return {
        "shape": (ones(3, 4), ValueError, r"\(3, 4\)"),
        "dtype": (ones(3, 3, dtype="float64"), TypeError, "float64"),
        "read-only": (read_only, ValueError, "read-only"),
        "broadcast": (np.lib.stride_tricks.as_strided(ones(3), (3, 3), (0, 4)), ValueError, "share memory"),
        "scalar": (np.float32(1), ValueError, r"shape \(\)"),  # type: ignore[dict-item]
        "list": ([[1.0]], TypeError, "out is of type list"),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("name", bad_outs())
def test_bad_out(name: str) -> None:
    out, error, words = bad_outs()[name]
    before = np.array(out)
    for call in (
        lambda: bikernels.matmul(ones(3, 3), ones(3, 3), out=out),
        lambda: bikernels.addmm(ones(3), ones(3, 3), ones(3, 3), out=out),
        lambda: bikernels.log_softmax(ones(3, 3), out=out),
        lambda: bikernels.mean(ones(3, 3, 2), axis=-1, out=out),
        lambda: bikernels.layer_norm(ones(3, 3), ones(3), out=out),
        lambda: bikernels.layer_norm_backward(ones(3, 3), ones(3, 3), ones(3, 1), ones(3, 1), out=out),
    ):
        with pytest.raises(error, match=words):
            call()
        assert (np.array(out) == before).all()


def test_out_may_not_overlap_an_input() -> None:
    memory = ones(8, 8)
    a, b, other = memory[:4, :4], memory[4:, 4:], memory[:4, 4:]
    bikernels.matmul(a, b, out=other)  # side by side in one array: no element in common
    for out in (a, b, memory[1:5, :4], memory[:4, 1:5]):
        before = memory.copy()
        with pytest.raises(ValueError, match=r"out shares memory with [ab]"):
            bikernels.matmul(a, b, out=out)
        assert (memory == before).all()
    with pytest.raises(ValueError, match="only c itself"):
        bikernels.addmm(memory[:4, 1:5], ones(4, 4), ones(4, 4), out=a)
    with pytest.raises(ValueError, match="out shares memory with x"):
        bikernels.softmax(a, out=a)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        bikernels.layer_norm(a, b[0], out=b)
    with pytest.raises(ValueError, match="out shares memory with rstd"):
        bikernels.rms_norm_with_statistics(a, out=(other, other[:, :1]))


def test_unaligned_elements_are_refused() -> None:
    packed = np.zeros(5, np.dtype([("tag", "u1"), ("value", "f4")]))
    with pytest.raises(ValueError, match=r"x: .*aligned"):
        bikernels.mean(packed["value"])


def test_an_operation_that_the_backend_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get("cpu"), "reductions", frozenset({"mean"}), raising=False)
    assert bikernels.mean(ones(2, 3, 19)).shape == ()
    with pytest.raises(bikernels.OperationUnsupportedError, match=r"sum cannot be computed by backend 'cpu'.*mean"):
        bikernels.sum(ones(2, 3, 19))


@pytest.mark.gpu
def test_a_class_that_the_device_cannot_compute(backend: Any) -> None:
    missing = [name for name in ("tc16f25", "tc8f24") if not backend.can_compute(name)]
    if not missing:
        pytest.skip("a CPU computes every class")
    x = backend.put(ones(2, 2, dtype="bfloat16"))
    for name in missing:
        out = backend.put(ones(2, 2, dtype="bfloat16"))
        with pytest.raises(bikernels.ArithmeticUnsupportedError, match=f"'{name}' cannot be computed on cuda:0"):
            bikernels.matmul(x, x, out=out, backend=backend.name, arithmetic=name)
        with bikernels.use_arithmetic(name), pytest.raises(bikernels.ArithmeticUnsupportedError):
            bikernels.matmul(x, x, out=out, backend=backend.name)
        assert (backend.get(out) == 1).all()


@pytest.mark.gpu
def test_operands_on_two_devices(backend: Any) -> None:
    if backend.name == "cpu":
        pytest.skip("needs a GPU")
    with pytest.raises(ValueError, match="b lies on cpu and a on cuda:0"):
        bikernels.matmul(backend.put(ones(2, 2)), ones(2, 2))
    with pytest.raises(ValueError, match="out lies on cpu and the operands on cuda:0"):
        bikernels.mean(backend.put(ones(2, 2)), axis=0, out=ones(2))
    with pytest.raises(ValueError, match=f"backend '{backend.name}' computes on cuda arrays"):
        bikernels.matmul(ones(2, 2), ones(2, 2), backend=backend.name)


# ---------------------------------------------------------------------------------------------------------- contexts


def test_use_arithmetic(rng: np.random.Generator) -> None:
    a, b = draw(rng, (5, 90), "bfloat16"), draw(rng, (90, 6), "bfloat16")
    portable, tensor_core = (reference.matmul(a, b, arithmetic=name, dtype="float32") for name in ("fma32", "tc16f25"))
    assert portable.tobytes() != tensor_core.tobytes()
    with bikernels.use_arithmetic("tc16f25"):
        assert_same_bits(bikernels.matmul(a, b, dtype="float32"), tensor_core)
        with bikernels.use_arithmetic("fma32"):
            assert_same_bits(bikernels.matmul(a, b, dtype="float32"), portable)
        assert_same_bits(bikernels.matmul(a, b, dtype="float32"), tensor_core)
        bikernels.matmul(ones(2, 2), ones(2, 2))  # float32 is not covered: it stays native
        assert_same_bits(bikernels.matmul(a, b, arithmetic="fma32", dtype="float32"), portable)
    assert_same_bits(bikernels.matmul(a, b, dtype="float32"), portable)
    with pytest.raises(ValueError, match="'tf32'"):
        bikernels.use_arithmetic("tf32")


def test_contexts_end_in_any_order() -> None:
    first, second = bikernels.use_arithmetic("tc16f25"), bikernels.use_arithmetic("fma32")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert bikernels.settings.current_arithmetic() == "fma32"
    second.__exit__(None, None, None)
    assert bikernels.settings.current_arithmetic() is None


def test_contexts_are_decorators_and_survive_exceptions() -> None:
    @bikernels.use_arithmetic("tc16f25")
    def fail(depth: int) -> None:
        assert bikernels.settings.current_arithmetic() == "tc16f25"
        if depth:
            fail(depth - 1)
        raise KeyError

    with pytest.raises(KeyError):
        fail(2)
    assert bikernels.settings.current_arithmetic() is None


def test_use_backend() -> None:
    with bikernels.use_backend("cpu"):
        assert bikernels.settings.current_backend() == "cpu"
        bikernels.matmul(ones(2, 2), ones(2, 2))
    assert bikernels.settings.current_backend() is None
    with pytest.raises(ValueError, match="'tpu'"):
        bikernels.use_backend("tpu")


@pytest.mark.parametrize("name", ["cupy", "numba"])
def test_a_backend_that_is_not_there_says_what_to_install(name: str) -> None:
    if bikernels.backends()[name].available:
        with pytest.raises(ValueError, match=f"backend '{name}' computes on cuda arrays"):
            bikernels.matmul(ones(2, 2), ones(2, 2), backend=name)
        return
    for call in (
        lambda: bikernels.use_backend(name),
        lambda: bikernels.matmul(ones(2, 2), ones(2, 2), backend=name),
        lambda: get(name),
    ):
        with pytest.raises(bikernels.BackendUnavailableError, match=f"'{name}' is not available: "):
            call()


@pytest.mark.parametrize(("value", "words"), [("cpu", "ok"), ("tpu", "ValueError"), ("numba", None)])
def test_environment_variable(value: str, words: str | None) -> None:
    if words is None:
        words = "ok" if bikernels.backends()["numba"].available else "BackendUnavailableError"
    code = (
        "import numpy, bikernels\n"
        "x = numpy.ones((2, 2), 'f4')\n"
        "try: bikernels.matmul(x, x); print('ok')\n"
        "except Exception as error: print(type(error).__name__)"
    )
    environment = os.environ | {"BIKERNELS_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == words


# ----------------------------------------------------------------------------------------------- threads and processes


def test_flush_to_zero_set_by_another_library_does_not_show() -> None:
    torch = pytest.importorskip("torch")
    a = np.full((3, 40), 2.0**-70, np.float32)
    x = np.full((3, 40), 2.0**-140, np.float32)
    expected = bikernels.matmul(a, a.T), bikernels.mean(x, axis=1)
    assert 0 < expected[0].max() < np.finfo(np.float32).smallest_normal
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        actual = bikernels.matmul(a, a.T), bikernels.mean(x, axis=1)
        still_flushes = float(torch.tensor([2.0**-80]) * 2.0**-60) == 0
    finally:
        torch.set_flush_denormal(False)
    assert still_flushes
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def test_concurrent_threads(rng: np.random.Generator) -> None:
    inputs = [(draw(rng, (65, 300), dtype), draw(rng, (300, 70), dtype)) for dtype in FLOATS]
    expected = [bikernels.matmul(a, b) for a, b in inputs]
    means = [bikernels.mean(a, axis=0) for a, _ in inputs]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                for (a, b), wanted, mean in zip(inputs, expected, means, strict=True):
                    assert_same_bits(bikernels.matmul(a, b), wanted)
                    assert_same_bits(bikernels.mean(a, axis=0), mean)
        except BaseException as error:  # noqa: BLE001  (reported by the main thread)
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_threads_that_have_not_used_the_gpu(backend: Any, rng: np.random.Generator) -> None:
    a, b, x = draw(rng, (5, 30), "float32"), draw(rng, (30, 7), "float32"), draw(rng, (3, 40), "float32")
    moved = [backend.put(array) for array in (a, b, x)]
    actual: list[np.ndarray] = []

    def work() -> None:
        product = bikernels.matmul(*moved[:2], backend=backend.name)
        softmax = bikernels.softmax(moved[2], backend=backend.name)
        actual.extend((backend.get(product), backend.get(softmax)))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(actual) == 4
    assert_same_bits(actual[0], actual[2])
    assert_same_bits(actual[1], actual[3])


@pytest.mark.gpu
def test_operands_of_several_streams(backend: Any, rng: np.random.Generator) -> None:
    """Each operand is waited for on its stream, and the result is ready on that of out."""
    if backend.name == "cpu":
        pytest.skip("streams are for GPUs")
    cupy = backend.xp
    a, b = (backend.put(draw(rng, (64, 64), "float32")) for _ in range(2))
    expected = backend.get(bikernels.matmul(a, b, backend=backend.name))
    busy = cupy.ones((4096, 4096), cupy.float32)
    out, late = cupy.zeros((64, 64), cupy.float32), cupy.zeros((64, 64), cupy.float32)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    cupy.cuda.Device().synchronize()
    with streams[1]:
        product = busy @ busy
        late[...] = b
    views = [
        bikernels.View(x.data.ptr, "float32", x.shape, (64, 1), bikernels.Device("cuda", 0), stream=stream.ptr)
        for x, stream in zip((a, late, out), streams, strict=True)
    ]
    assert bikernels.matmul(*views[:2], out=views[2], backend=backend.name) is views[2]
    assert views[2].stream == streams[2].ptr
    assert_same_bits(out.get(stream=streams[2]), expected)
    del product


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork() -> None:
    code = """
import os, sys, numpy, bikernels
a = numpy.random.default_rng(0).standard_normal((300, 300))
expected = bikernels.matmul(a, a).tobytes()
pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if bikernels.matmul(a, a).tobytes() == expected else 1)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
print(codes, bikernels.matmul(a, a).tobytes() == expected)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[0, 0, 0] True"


@pytest.mark.parametrize("variable", ["NUMBA_NUM_THREADS", "OMP_NUM_THREADS"])
def test_the_number_of_threads_does_not_show(variable: str) -> None:
    code = """
import hashlib, numpy, bikernels
rng = numpy.random.default_rng(0)
digest = hashlib.sha256()
for dtype in ("float16", "float32", "float64"):
    a, b = rng.standard_normal((130, 400)).astype(dtype), rng.standard_normal((400, 300)).astype(dtype)
    for x in (bikernels.matmul(a, b), bikernels.log_softmax(b), bikernels.mean(b), bikernels.mean(b, axis=0)):
        digest.update(x.tobytes())
print(digest.hexdigest())
"""
    digests = set()
    for threads in ("1", "2"):
        environment = os.environ | {variable: threads}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        digests.add(done.stdout)
    assert len(digests) == 1
