"""The needle: one row alone, then in batches of ragged sizes among hostile neighbours. The same bytes every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels.dtypes import NUMPY_DTYPE

from .cases import FLOATS, RAGGED, assert_same_bits, draw

NEIGHBOURS = {"normal": None, "nan": np.nan, "infinity": np.inf, "huge": 2.0**120}


def batch_around(rng: np.random.Generator, needle: np.ndarray, size: int, position: int, neighbour: str) -> np.ndarray:
    """`size` rows; the needle at `position`, the others as `neighbour` says."""
    value = NEIGHBOURS[neighbour]
    if value is None:
        batch = draw(rng, (size, len(needle)), str(needle.dtype))
    else:
        with np.errstate(over="ignore"):
            batch = np.full((size, len(needle)), value).astype(needle.dtype)
    batch[position] = needle
    return batch


def positions(size: int) -> list[int]:
    """The ends, the middle, and the edges of tiles of 8 to 128 rows."""
    return sorted({p for p in (0, 1, 7, 8, 15, 63, 64, 127, size // 2, size - 1) if p < size})


def operations(backend: Any, dtype: str, rng: np.random.Generator) -> dict[str, Any]:
    """Functions of a batch of rows of 70 elements, each to one row per row."""
    b = backend.put(draw(rng, (70, 33), dtype))
    bias = backend.put(draw(rng, (33,), dtype))
    weight, shift = backend.put(draw(rng, (70,), dtype)), backend.put(draw(rng, (70,), dtype))
    name = backend.name

    def backward(operation: str, *others: int) -> Any:
        """A backward pass with the batch as gradient, as x and, of some columns, as statistics of the rows."""
        function = getattr(bikernels, operation)
        return lambda x: function(x, x, *(x[:, i : i + 1] for i in others), backend=name)

    def one_for_a_row(operation: str) -> Any:
        return lambda x: getattr(bikernels, operation)(x, axis=-1, keepdims=True, backend=name)

    return {
        "matmul": lambda x: bikernels.matmul(x, b, backend=name),
        "matmul, x on the right": lambda x: bikernels.matmul(b.T, x.T, backend=name).T,
        "addmm": lambda x: bikernels.addmm(bias, x, b, alpha=0.5, beta=2.0, backend=name),
        "batched matmul": lambda x: bikernels.matmul(x[:, None, :], b, backend=name)[:, 0],
        "log_softmax": lambda x: bikernels.log_softmax(x, backend=name),
        "softmax": lambda x: bikernels.softmax(x, backend=name),
        "softmax_backward": backward("softmax_backward"),
        "log_softmax_backward": backward("log_softmax_backward"),
        "rms_norm": lambda x: bikernels.rms_norm(x, weight, backend=name),
        "rms_norm, first axis": lambda x: bikernels.rms_norm(x.T, weight, axis=0, backend=name).T,
        "rms_norm_backward": backward("rms_norm_backward", 3),
        "layer_norm": lambda x: bikernels.layer_norm(x, weight, shift, backend=name),
        "layer_norm_backward": backward("layer_norm_backward", 3, 4),
        "mean, first axis": lambda x: bikernels.mean(x.T, axis=0, keepdims=True, backend=name).T,
        "var, first axis": lambda x: bikernels.var(x.T, axis=0, keepdims=True, backend=name).T,
        "mean": one_for_a_row("mean"),
        "sum": one_for_a_row("sum"),
        "var": one_for_a_row("var"),
        "std": one_for_a_row("std"),
        "logsumexp": one_for_a_row("logsumexp"),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_needle(backend: Any, dtype: str, neighbour: str, rng: np.random.Generator) -> None:
    needle = draw(rng, (70,), dtype)
    for name, function in operations(backend, dtype, rng).items():
        alone = backend.get(function(backend.put(needle[None])))[0]
        assert np.isfinite(alone.astype(np.float64)).all()
        for size in RAGGED:
            for position in positions(size):
                batch = backend.put(batch_around(rng, needle, size, position, neighbour))
                actual = backend.get(function(batch))[position]
                assert_same_bits(actual, alone, f"{name}, row {position} of {size}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_trailing_zeros_of_k_change_nothing(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    a, b = draw(rng, (5, 90), dtype, "wide"), draw(rng, (90, 7), dtype, "wide")
    expected = backend.call("matmul", a, b)
    for zeros in (1, 6, 16, 500):
        a_padded = np.concatenate([a, np.zeros((5, zeros), a.dtype)], 1)
        b_padded = np.concatenate([b, draw(rng, (zeros, 7), dtype)], 0)
        assert_same_bits(backend.call("matmul", a_padded, b_padded), expected, f"{zeros} zeros")


@pytest.mark.parametrize("dtype", FLOATS)
def test_row_of_a_large_product(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    a, b = draw(rng, (257, 1030), dtype), draw(rng, (1030, 131), dtype)
    whole = backend.call("matmul", a, b)
    for m in (1, 2, 3, 8, 17, 64, 100, 256):
        assert_same_bits(backend.call("matmul", a[:m], b), whole[:m], f"{m} rows")
    for n in (1, 2, 8, 33, 130):
        assert_same_bits(backend.call("matmul", a, b[:, :n]), whole[:, :n], f"{n} columns")


@pytest.mark.gpu
def test_graph_replay_on_a_side_stream(backend: Any, rng: np.random.Generator) -> None:
    if backend.name == "cpu":
        pytest.skip("CUDA graphs are for GPUs")
    cp = backend.xp
    for dtype in FLOATS:
        a, b = backend.put(draw(rng, (65, 300), dtype)), backend.put(draw(rng, (300, 5000), dtype))
        long = backend.put(draw(rng, (1, 600_000), dtype))  # what is divided between launches has a workspace

        def compute(a: Any = a, b: Any = b, long: Any = long) -> list[Any]:
            product = bikernels.matmul(a, b, backend=backend.name)
            _, mean, rstd = bikernels.layer_norm_with_statistics(product, backend=backend.name)
            return [
                product,
                *(
                    function(x, axis=axis, backend=backend.name)
                    for function in (bikernels.softmax, bikernels.log_softmax, bikernels.std, bikernels.mean)
                    for x, axis in ((product, 1), (long, 1), (long.reshape(200_000, 3), 0))
                ),
                bikernels.layer_norm_backward(product, product, mean, rstd, backend=backend.name),
                bikernels.layer_norm_weight_backward(product, product, mean, rstd, backend=backend.name),
                bikernels.log_softmax_backward(product, product, backend=backend.name),
                bikernels.mean(product, axis=0, backend=backend.name),
                bikernels.sum(product, axis=0, backend=backend.name),
                bikernels.var(product, axis=1, backend=backend.name),
                bikernels.logsumexp(product, axis=1, backend=backend.name),
                *bikernels.rms_norm_with_statistics(product, backend=backend.name),
                *bikernels.layer_norm_with_statistics(product, backend=backend.name),
                bikernels.softmax_backward(product, product, backend=backend.name),
            ]

        expected = [backend.get(x) for x in compute()]
        stream = cp.cuda.Stream(non_blocking=True)
        cp.cuda.runtime.deviceSynchronize()
        with stream:
            for actual, wanted in zip(compute(), expected, strict=True):
                assert_same_bits(backend.get(actual), wanted, f"{dtype} on a side stream")
            stream.begin_capture()
            captured = compute()
            graph = stream.end_capture()
            for _ in range(2):
                for x in captured:
                    x.fill(0)
                graph.launch(stream)
                stream.synchronize()
                for actual, wanted in zip(captured, expected, strict=True):
                    assert_same_bits(backend.get(actual), wanted, f"{dtype} replayed")


@pytest.mark.gpu
def test_launches_wait_for_what_comes_before(backend: Any, rng: np.random.Generator) -> None:
    """Products may be launched early; operands that a copy, a fill, a kernel or another stream has just written, and a
    result that is overwritten right after it was read, are still seen in order, eager and in a graph.
    """
    if backend.name == "cpu":
        pytest.skip("CUDA streams are for GPUs")
    cp = backend.xp
    bfloat16 = NUMPY_DTYPE["bfloat16"]
    weights = [backend.put(draw(rng, (2048, 2048), "bfloat16")) for _ in range(3)]
    start = backend.put(draw(rng, (16, 2048), "bfloat16"))
    main, side = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    copied, x, y = (cp.empty((16, 2048), bfloat16) for _ in range(3))
    kept = cp.empty((4, 16, 2048), bfloat16)
    device_to_device = 3

    def multiply(a: Any, b: Any, out: Any) -> None:
        bikernels.matmul(a, b, out=out, backend=backend.name)

    def copy(target: Any, source: Any, stream: Any) -> None:
        cp.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, device_to_device, stream.ptr)

    def run() -> None:
        with main:
            copy(copied, start, main)  # a memcpy before a product
            multiply(copied, weights[0], x)
            copied.view(cp.uint16).fill(0)  # a kernel that overwrites what the product read
            copy(kept[0], x, main)
            multiply(x, weights[1], y)  # a product before a product
            multiply(y, weights[2], x)  # that overwrites what the one before read
            copy(kept[1], x, main)
            forked = main.record()
            side.wait_event(forked)
        with side:
            multiply(x, weights[0], kept[2])
            joined = side.record()
        with main:
            multiply(x, weights[1], y)
            main.wait_event(joined)  # two predecessors
            multiply(kept[2], weights[2], kept[3])

    cp.cuda.runtime.deviceSynchronize()
    first = bikernels.matmul(start, weights[0], backend=backend.name)
    second = bikernels.matmul(
        bikernels.matmul(first, weights[1], backend=backend.name), weights[2], backend=backend.name
    )
    third = bikernels.matmul(second, weights[0], backend=backend.name)
    fourth = bikernels.matmul(third, weights[2], backend=backend.name)
    expected = [backend.get(each) for each in (first, second, third, fourth)]
    cp.cuda.runtime.deviceSynchronize()

    def check(how: str) -> None:
        main.synchronize()
        for name, actual, wanted in zip(("first", "second", "third", "fourth"), kept, expected, strict=True):
            assert_same_bits(backend.get(actual), wanted, f"{name}, {how}")

    for _ in range(20):
        run()
    check("eager")
    with main:
        main.begin_capture()
        run()
        graph = main.end_capture()
        for _ in range(20):
            graph.launch(main)
    check("in a graph")


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(backend: Any, rng: np.random.Generator) -> None:
    if backend.name == "cpu":
        pytest.skip("takes too long on a CPU")
    cp = backend.xp
    rows, n = 70_000, 32_768  # 2.3e9 elements, 4.6 GB
    x = cp.empty((rows, n), NUMPY_DTYPE["bfloat16"])
    row = backend.put(draw(rng, (n,), "bfloat16"))
    x[...] = row
    for function in (bikernels.log_softmax, bikernels.mean):
        expected = backend.get(function(row[None], axis=-1, backend=backend.name))[0]
        actual = function(x, axis=-1, backend=backend.name)
        for i in (0, 1, 65_535, 65_536, rows - 1):
            assert_same_bits(backend.get(actual[i : i + 1])[0], expected, f"row {i}")
        del actual
    b = backend.put(draw(rng, (n, 16), "bfloat16"))
    expected = backend.get(bikernels.matmul(row[None], b, backend=backend.name))[0]
    actual = bikernels.matmul(x, b, backend=backend.name)
    for i in (0, 1, 65_535, 65_536, rows - 1):
        assert_same_bits(backend.get(actual[i : i + 1])[0], expected, f"row {i} of the product")
