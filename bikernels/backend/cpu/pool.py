"""A pool of native threads that help with a call and wait for the next one without the GIL.

A thread of Python that has to wake up and get the GIL costs more than most reductions take. These threads never meet
Python: `serve`, which they run, is compiled code. After a call they look out for the next one for a short while, then
they sleep on a condition variable. Threads are those of POSIX; where there are none, `start` starts none.

One call at a time has the pool (`_TAKEN`); its caller works too and never waits for a thread that has not begun, so a
pool without threads (in a forked child, while the interpreter shuts down) only makes it slower. All that caller and
helpers share is one word, `_STATE`: the number of the call, whether it is open to helpers, and how many are at work on
it. A caller closes the call when it has found nothing left to do, and returns when the last helper has left.
"""

from __future__ import annotations

import ctypes
import functools
import signal
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from . import vectors
from .compile import address_of, inner, invoke, kernel, primitive
from .environment import DEFAULT, exchange
from .numerics import pointer

_STATE, _SLEEPERS, _TAKEN, _WANTED, _WORK, _ARGUMENT, _STARTED = 0, 8, 16, 24, 25, 26, 27
"""Words of a pool, int64: the state; threads that sleep; whether a call has the pool; of the call, the helpers that are
wanted, its function and what that is given; threads that have begun. The first three have cache lines of their own."""

_LOCK, _UNLOCK, _WAIT, _SIGNAL, _YIELD, _MUTEX, _CALLED, _LEFT = range(32, 40)
"""Addresses: of functions, of a mutex, and of conditions: a call is open, and the last helper has left one."""

_OBJECTS, _OBJECT_WORDS = 40, 16
"""Where those three lie, and how much room each has: more than any system's takes."""

_WORDS = _OBJECTS + 3 * _OBJECT_WORDS

_HELPER, _STOP, _OPEN, _CALL = 1, 1 << 14, 1 << 15, 1 << 16
"""Of the state: what each adds."""

_LOOKS, _YIELDS = 2500, 2000
"""How often a thread looks for what it waits for: first without a break, for tens of microseconds, as long as Python
takes from one call to the next; a helper then lets other threads have its processor before each look, for about a
millisecond, before it sleeps."""

_WOKEN = 2
"""Threads that a thread wakes. Each wakes as many more: a caller that woke all would begin last."""


# ------------------------------------------------------------------------------------------------------- compiled code


@primitive
def _look(typing_context: Any, address: Any) -> Any:
    """The word at an address, which another thread may change."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.int64), codegen


@primitive
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to the word at an address, atomically; the sum."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.add(builder.atomic_rmw("add", place, values[1], "seq_cst"), values[1])

    return types.int64(types.int64, types.int64), codegen


@primitive
def _replace(typing_context: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put a value in the place of the expected one, atomically; whether that was there."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.extract_value(builder.cmpxchg(place, values[1], values[2], "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@primitive
def _pause(typing_context: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if vectors.is_x86(builder):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=kind), [])
        elif str(builder.module.triple).startswith(("aarch64", "arm64")):
            builder.asm(ir.FunctionType(ir.VoidType(), []), "isb", "~{memory}", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(), codegen


@inner
def _word(pool, which):  # type: ignore[no-untyped-def]
    return pointer(pool, np.int64)[which]


@inner
def _lock(pool):  # type: ignore[no-untyped-def]
    invoke(_word(pool, _LOCK), (_word(pool, _MUTEX),))


@inner
def _unlock(pool):  # type: ignore[no-untyped-def]
    invoke(_word(pool, _UNLOCK), (_word(pool, _MUTEX),))


@inner
def _wait(pool, condition):  # type: ignore[no-untyped-def]
    invoke(_word(pool, _WAIT), (_word(pool, condition), _word(pool, _MUTEX)))


@inner
def _wake(pool, condition, number):  # type: ignore[no-untyped-def]
    """Wake so many of those who wait. What they wait for has been written, and none is about to wait after the lock."""
    _lock(pool)
    _unlock(pool)
    for _ in range(number):
        invoke(_word(pool, _SIGNAL), (_word(pool, condition),))


@inner
def _calls(state, seen):  # type: ignore[no-untyped-def]
    """Whether a thread that has seen that call has something to do."""
    return state & _STOP != 0 or (state & _OPEN != 0 and state // _CALL != seen)


@inner
def _wanted(pool, state):  # type: ignore[no-untyped-def]
    """How many more helpers the call would have."""
    return _word(pool, _WANTED) - state % _STOP if state & _OPEN != 0 else 0


def _serve(pool):  # type: ignore[no-untyped-def]
    """What a thread of the pool runs."""
    exchange(DEFAULT)
    number = _add(pool + 8 * _STARTED, 1)
    place, seen, looks = pool + 8 * _STATE, 0, 0
    while True:
        state = _look(place)
        if state & _STOP != 0:
            return
        if _calls(state, seen):
            looks = 0
            if _wanted(pool, state) <= 0:
                seen = state // _CALL
            elif _replace(place, state, state + _HELPER):
                seen = state // _CALL
                invoke(_word(pool, _WORK), (_word(pool, _ARGUMENT), number))
                state = _add(place, -_HELPER)
                if state & _OPEN == 0 and state % _STOP == 0:
                    _wake(pool, _LEFT, 1)
        elif looks < _LOOKS:
            looks += 1
            _pause()
        elif looks < _LOOKS + _YIELDS:
            looks += 1
            invoke(_word(pool, _YIELD), ())
        else:
            looks = 0
            _lock(pool)
            _add(pool + 8 * _SLEEPERS, 1)
            while not _calls(_look(place), seen):
                _wait(pool, _CALLED)
            asleep = _add(pool + 8 * _SLEEPERS, -1)
            _unlock(pool)
            for _ in range(min(_WOKEN, asleep, _wanted(pool, _look(place)) - 1)):
                invoke(_word(pool, _SIGNAL), (_word(pool, _CALLED),))


@inner
def run(pool, helpers, work, argument):  # type: ignore[no-untyped-def]
    """Call work(argument, 0) in this thread and work(argument, number) in up to so many of the pool.

    Each of those has a number of its own, from 1 on. False, and nothing is done, if another call has the pool.
    """
    if helpers > 0 and not _replace(pool + 8 * _TAKEN, 0, 1):
        return False
    before = exchange(DEFAULT)
    if helpers > 0:
        words, place = pointer(pool, np.int64), pool + 8 * _STATE
        words[_WANTED], words[_WORK], words[_ARGUMENT] = helpers, work, argument
        _add(place, _CALL + _OPEN)
        asleep = min(_WOKEN, helpers, _look(pool + 8 * _SLEEPERS))
        if asleep > 0:
            _wake(pool, _CALLED, asleep)
        invoke(work, (argument, 0))
        state, looks = _add(place, -_OPEN), 0
        while state % _STOP != 0 and looks < _LOOKS:
            _pause()
            state, looks = _look(place), looks + 1
        if state % _STOP != 0:
            _lock(pool)
            while _look(place) % _STOP != 0:
                _wait(pool, _LEFT)
            _unlock(pool)
        _add(pool + 8 * _TAKEN, -1)
    else:
        invoke(work, (argument, 0))
    exchange(before)
    return True


@kernel
def call(pool, helpers, work, argument):  # type: ignore[no-untyped-def]
    """`run`, from Python."""
    return run(pool, helpers, work, argument)


def _stop(pool):  # type: ignore[no-untyped-def]
    """Let the threads end, each when it has done what it is at."""
    _add(pool + 8 * _STATE, _STOP)
    _wake(pool, _CALLED, _look(pool + 8 * _SLEEPERS))


@functools.cache
def _native(function: Any) -> Any:
    """A function of an int64, for calls from C and from Python without the GIL."""
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address_of(function, types.int64))


# -------------------------------------------------------------------------------------------------------- from Python


@functools.cache
def _system() -> ctypes.CDLL | None:
    """The library with the threads of POSIX."""
    try:
        library = ctypes.CDLL(None)
        library.pthread_create, library.pthread_cond_wait, library.sched_yield  # noqa: B018  (missing ones raise)
    except (TypeError, OSError, AttributeError):
        return None
    return library if hasattr(signal, "pthread_sigmask") else None


class Pool:
    """Threads, of which `start` starts some and `stop` ends all."""

    def __init__(self) -> None:
        self._growing = threading.Lock()
        self._threads: list[ctypes.c_size_t] = []
        self._words: np.ndarray[Any, Any] | None = None
        self.address = 0
        """For `run`; there is one as soon as there are threads."""
        self._stopped = False

    def start(self, number: int) -> int:
        """Have so many threads if possible; how many of them there are."""
        if len(self._threads) < number:
            with self._growing:
                self._grow(number)
        return min(number, len(self._threads))

    def _grow(self, number: int) -> None:
        system = _system()
        if system is None or self._stopped:
            return
        if self._words is None:
            self._words = np.zeros(_WORDS + 8, np.int64)
            skipped = -self._words.ctypes.data % 64 // 8
            words = self._words[skipped:]
            self.address = words.ctypes.data
            names = ("pthread_mutex_lock", "pthread_mutex_unlock", "pthread_cond_wait", "pthread_cond_signal")
            for i, name in enumerate((*names, "sched_yield")):
                words[_LOCK + i] = ctypes.cast(getattr(system, name), ctypes.c_void_p).value
            for i, name in enumerate(("mutex", "cond", "cond")):
                words[_MUTEX + i] = self.address + 8 * (_OBJECTS + i * _OBJECT_WORDS)
                getattr(system, f"pthread_{name}_init")(ctypes.c_void_p(int(words[_MUTEX + i])), None)
        serve = ctypes.cast(_native(_serve), ctypes.c_void_p)
        # Signals are for the threads of Python. A new thread has the mask of the one that starts it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while len(self._threads) < number:
                thread = ctypes.c_size_t()
                if system.pthread_create(ctypes.byref(thread), None, serve, ctypes.c_void_p(self.address)):
                    return  # the system allows no more
                self._threads.append(thread)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def stop(self) -> None:
        """End the threads: their code must outlive them. Calls go on alone."""
        with self._growing:
            self._stopped = True
            system, threads, self._threads = _system(), self._threads, []
        if system is not None and threads:
            _native(_stop)(self.address)
            for thread in threads:
                system.pthread_join(thread, None)
