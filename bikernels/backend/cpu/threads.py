"""In which threads kernels run: `run` takes a function of Python, and has a pool of Python threads.

Compiled code has one of native threads (`native_pool`, for `pool.run`), which wake up in a fraction of the time; where
another call has them, `run_compiled` makes do with the threads of Python.

Numba's own threading layers are not used: OpenMP does not survive a fork, workqueue aborts when two threads call it,
TBB is not everywhere. Here every thread that works on a call runs the same function, which takes pieces of the work
from a counter in shared memory until none is left. The caller takes part, so a call never waits for a thread of the
pool that has not begun, and any number of threads may call at once. How the pieces are shared out decides no bit.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from numba import config
from numba.np.ufunc import parallel

from . import pool
from .environment import in_default_environment


def limit() -> int:
    """The most threads a call may use.

    It is the least of NUMBA_NUM_THREADS, numba.set_num_threads, OMP_NUM_THREADS (as the process found it) and the CPUs
    this process may run on.
    """
    most = min(config.NUMBA_NUM_THREADS, _processors())  # type: ignore[attr-defined]
    if parallel._is_initialized:  # asking before somebody has set it would start Numba's threading layer
        most = min(most, parallel.get_num_threads())
    return min(most, _OPENMP)


def _processors() -> int:
    """The CPUs that this process may run on: asked for now and then, since that takes as long as a small reduction."""
    global _known
    if next(_calls) % _ASK_AFTER == 0:
        _known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _known


_calls, _known, _ASK_AFTER = itertools.count(), 1, 64


def _openmp_threads() -> int:
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else sys.maxsize


_OPENMP = _openmp_threads()
"""Read once: a call should not wait for a look at the environment."""


class _Job:
    """One call: `help` is run by threads of the pool, `run` by the caller."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._helping = 0
        self._closed = False
        self._finished = threading.Lock()
        self._finished.acquire()
        self._error: BaseException | None = None

    def help(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._helping += 1
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  (the caller raises it)
            self._error = error
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._helping -= 1
            if self._closed and not self._helping:
                self._finished.release()

    def run(self) -> None:
        try:
            self._work()
        finally:
            with self._lock:
                self._closed = True
                wait = self._helping > 0
            interrupt = None
            while wait:  # even when interrupted: the others still write to the caller's memory
                try:
                    wait = not self._finished.acquire()
                except BaseException as error:  # noqa: BLE001  (raised below)
                    interrupt = error
            if interrupt is not None:
                raise interrupt
        if self._error is not None:
            raise self._error


class _Pool:
    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._size = 0

    def run(self, work: Callable[[], None], threads: int) -> None:
        with self._lock:
            while self._size < threads - 1:
                try:
                    threading.Thread(target=self._serve, name="bikernels", daemon=True).start()
                except RuntimeError:  # no more threads here, or the interpreter is shutting down
                    break
                self._size += 1
            helpers = min(threads - 1, self._size)
        job = _Job(work)
        for _ in range(helpers):
            self._jobs.put(job)
        job.run()

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            job.help()
            del job  # holds the caller's arrays


_pool, _native_pool = _Pool(), pool.Pool()


def _reset() -> None:
    global _pool, _native_pool
    _pool, _native_pool = _Pool(), pool.Pool()


atexit.register(lambda: _native_pool.stop())  # that of the day


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)  # the child has none of its parent's threads


def run(work: Callable[[], None], pieces: int, cost: float) -> None:
    """Run `work`, which takes pieces of a job until none is left, in as many threads as pay.

    Args:
        work: called once in each thread; it must be safe to call in several at a time.
        pieces: into how many pieces the job divides; no more threads than that are used.
        cost: about how many nanoseconds the job takes one thread.
    """
    threads = min(pieces, int(cost // _WORTH_A_THREAD) + 1)
    if threads > 1:
        threads = min(threads, limit())
    if threads > 1:
        _pool.run(functools.partial(in_default_environment, work), threads)
    else:
        in_default_environment(work)


def useful(pieces: int, cost: float) -> int:
    """In how many threads a compiled job is best run; see `run` for what it is told."""
    return min(pieces, int(cost // _WORTH_A_NATIVE_THREAD) + 1)


def native_pool(threads: int) -> int:
    """The address of a pool for `pool.run` in so many threads, the caller among them; 0 if there are no others."""
    return _native_pool.address if threads > 1 and _native_pool.start(threads - 1) else 0


def run_compiled(work: int, argument: int, threads: int, cost: float) -> None:
    """What `pool.run` does, for a call whose pool another call has: with threads of Python if that pays.

    Args:
        work: the address of a function that is called as work(argument, 0) in each thread that comes, which may be more
            than `threads` when the first have already left.
        argument: what it is given.
        threads: as many as are to work on it.
        cost: as `run` is told.
    """
    alone = functools.partial(pool.call, 0, 0, work, argument)
    if threads > 1 and cost >= _WORTH_PYTHON_THREADS:
        _pool.run(alone, threads)
    else:
        alone()


class _Memory:
    """So many bytes. While the interpreter ends they are not given back: compiled code may still write to them."""

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size + 63)
        self.address = (ctypes.addressof(ctypes.c_char.from_buffer(self._bytes)) + 63) // 64 * 64
        """That of a cache line."""

    def __del__(
        self,
        is_ending: Callable[[], bool] = sys.is_finalizing,
        keep: Callable[[ctypes.py_object[Any]], object] = ctypes.pythonapi["Py_IncRef"],
        held: type[ctypes.py_object[Any]] = ctypes.py_object,
    ) -> None:
        if is_ending():
            keep(held(self._bytes))


class _Scratch(threading.local):
    memory: _Memory | None = None
    size, address = 0, 0


_scratch = _Scratch()


def scratch(size: int) -> int:
    """The address, that of a cache line, of so many bytes that are the calling thread's own until it asks again."""
    if size > _scratch.size:
        memory = _Memory(size)
        _scratch.memory, _scratch.size, _scratch.address = memory, size, memory.address
    return _scratch.address


_WORTH_A_THREAD, _WORTH_A_NATIVE_THREAD = 30_000.0, 15_000.0
"""Nanoseconds of work below which waking another thread costs more than it saves."""

_WORTH_PYTHON_THREADS = 250_000.0
"""Nanoseconds of work on rows in place that one thread does before a second one, of Python, has helped."""

FEW = 4
"""Pieces per thread below which a job is better cut into smaller ones."""
