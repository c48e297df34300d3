"""The CPU backend's native threads: they come when they are asleep or awake, all leave, and nothing needs them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numba import types

import bikernels
from bikernels.backend.cpu import pool, threads
from bikernels.backend.cpu.compile import address_of
from bikernels.backend.cpu.numerics import take

pytestmark = pytest.mark.skipif(pool._system() is None, reason="needs the threads of POSIX")

ARRIVED, LEFT, EXPECTED, NUMBERED = range(4)
PATIENCE = 2_000_000_000
"""Looks for the others, after which one that waits gives up."""


def _meet(call, number):  # type: ignore[no-untyped-def]
    """Arrive, wait until as many as are expected have, then leave; of whom each has a number of its own."""
    take(call + 8 * ARRIVED)
    take(call + 8 * (NUMBERED + number))
    looks = 0
    while pool._look(call + 8 * ARRIVED) < pool._look(call + 8 * EXPECTED) and looks < PATIENCE:
        looks += 1
    take(call + 8 * LEFT)


@pytest.fixture(scope="module")
def meet() -> int:
    return address_of(_meet, types.int64, types.int64)


@pytest.fixture
def two() -> Iterator[pool.Pool]:
    """A pool of two threads, however many processors there are."""
    made = pool.Pool()
    assert made.start(2) == 2
    yield made
    made.stop()


def numbers(expected: int) -> Any:
    return np.array([0, 0, expected, 0, 0, 0], np.int64)


def run(made: pool.Pool, helpers: int, work: int, call: Any) -> bool:
    return bool(pool.call(made.address, helpers, work, call.ctypes.data))


@pytest.mark.parametrize("pause", [0.0, 0.0002, 0.02], ids=["awake", "yielding", "asleep"])
def test_helpers_come_and_have_left(two: pool.Pool, meet: int, pause: float) -> None:
    for helpers in (2, 1, 2, 0) * 5:
        time.sleep(pause)
        call = numbers(1 + helpers)
        assert run(two, helpers, meet, call)
        assert call[ARRIVED] == call[LEFT] == call[NUMBERED:].sum()
        assert call[NUMBERED] == 1  # the caller
        assert helpers < 2 or call[NUMBERED:].all()
        # When one helper has left, the other may come in its place.
        assert 1 + helpers <= call[ARRIVED] <= (3 if helpers else 1)


def test_a_pool_that_is_taken_says_so(two: pool.Pool, meet: int) -> None:
    call, other = numbers(4), numbers(1)
    caller = threading.Thread(target=run, args=(two, 2, meet, call))
    caller.start()
    while call[ARRIVED] < 3:
        time.sleep(0.001)
    assert not run(two, 2, meet, other)
    assert other[ARRIVED] == 0
    call[EXPECTED] = 3
    caller.join()
    assert call[LEFT] == 3
    assert run(two, 0, meet, other)
    assert run(two, 2, meet, numbers(3))


def test_what_a_taken_pool_refuses_is_done_elsewhere(meet: int) -> None:
    for cost, expected in ((0.0, 1), (1e9, 2)):  # alone, then with a thread of Python
        call = numbers(expected)
        threads.run_compiled(meet, call.ctypes.data, 2, cost)
        assert call[ARRIVED] == call[LEFT] == expected


def test_a_reduction_whose_pool_is_taken(two: pool.Pool, meet: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_native_pool", two)
    monkeypatch.setattr(threads, "limit", lambda: 3)
    x = np.random.default_rng(0).standard_normal((600, 600))
    expected = bikernels.mean(x, axis=1).tobytes()
    call = numbers(4)
    caller = threading.Thread(target=run, args=(two, 2, meet, call))
    caller.start()
    while call[ARRIVED] < 3:
        time.sleep(0.001)
    for cost in (0.0, float("inf")):  # of what is worth threads of Python
        monkeypatch.setattr(threads, "_WORTH_PYTHON_THREADS", cost)
        assert bikernels.mean(x, axis=1).tobytes() == expected
    call[EXPECTED] = 3
    caller.join()
    assert call[LEFT] == 3


def test_after_the_end_calls_are_done_alone(meet: int) -> None:
    ended = pool.Pool()
    assert ended.start(2) == 2
    ended.stop()
    assert ended.start(2) == 0
    call = numbers(1)
    assert run(ended, 2, meet, call)
    assert call[LEFT] == 1


def test_forked_children_and_the_end_of_the_interpreter() -> None:
    """With threads that wait, a child starts its own, and the interpreter ends while another thread calls."""
    code = """
import os, threading, numpy, bikernels
from bikernels.backend.cpu import threads
threads.limit = lambda: 3
x = numpy.random.default_rng(0).standard_normal((600, 600))
expected = bikernels.mean(x, axis=1).tobytes()
started = len(threads._native_pool._threads)
pid = os.fork()
if pid == 0:
    own = len(threads._native_pool._threads)
    same = bikernels.mean(x, axis=1).tobytes() == expected
    os._exit(0 if same and own == 0 and len(threads._native_pool._threads) == 2 else 1)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def call():
    while True:
        bikernels.mean(x, axis=1)
threading.Thread(target=call, daemon=True).start()
print(started, code, bikernels.mean(x, axis=1).tobytes() == expected)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | {"MALLOC_PERTURB_": "165"}  # glibc overwrites what is freed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 0 True"
