"""When the batch-invariant mode is on.

The model. The process has one list of decisions, oldest first; each says "on" or "off", and the newest one decides.
With an empty list the mode is off.

- Entering `set_batch_invariant_mode(enabled)` appends a decision, and leaving takes back that very decision, wherever
  in the list it is by then. So contexts may end in any order, in any thread, by an exception or by the end of a
  suspended generator, and never take back another's decision.
- `enable_batch_invariant_mode()` and `disable_batch_invariant_mode()` append a decision that no context takes back. It
  replaces the previous such decision, so the list does not grow.

Hence `disable_batch_invariant_mode()` within a context switches the mode off at once, and it stays off when the context
ends; `set_batch_invariant_mode(False)` within a context switches it off for that while.

The list is the process's, not the thread's, since PyTorch's overrides are: while the mode is on it is on for every
thread. Overrides are registered when the newest decision changes from off to on and removed when it changes back.

A decision may be strict (`strict.py`) or portable (`operators/portable.py`); like the rest, that is as the newest
decision says.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from bikernels.settings import current_arithmetic, current_backend

from . import core
from .overrides import PORTABLE, Overrides
from .strict import Guards

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Decision:
    """On or off, and the bikernels settings of the context in which it was made."""

    def __init__(self, enabled: bool, permanent: bool, strict: bool = False, portable: bool = False) -> None:
        self.enabled = enabled
        self.permanent = permanent
        self.strict = strict
        self.portable = portable
        self.settings = core.Settings(current_backend(), current_arithmetic())


_lock = threading.RLock()
_decisions: list[_Decision] = []
_overrides = Overrides()
_guards = Guards()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it does not exist here


os.register_at_fork(after_in_child=_after_fork_in_child)


def _decide(decisions: list[_Decision]) -> None:
    """Make `decisions` the list, and the overrides what it says; the caller holds the lock. All or nothing."""
    try:
        _apply(decisions)
    except BaseException:
        _apply(_decisions)
        raise
    _decisions[:] = decisions


def _apply(decisions: list[_Decision]) -> None:
    newest = decisions[-1] if decisions and decisions[-1].enabled else None
    # Guards stand before the portable overrides and those before the others: what was put in last goes first.
    if newest is None or not newest.strict or newest.portable is not PORTABLE.installed:
        _guards.remove()
    if newest is None or not newest.portable:
        PORTABLE.remove()
    if newest is not None:
        core.set_mode_settings(newest.settings)
        _overrides.install()
        if newest.portable:
            PORTABLE.install()
        if newest.strict:
            _guards.install()
    else:
        _overrides.remove()
        core.set_mode_settings(core.NO_SETTINGS)


def is_batch_invariant_mode_enabled() -> bool:
    """Whether the mode is on, for the whole process."""
    with _lock:
        return bool(_decisions) and _decisions[-1].enabled


def enable_batch_invariant_mode() -> None:
    """Switch the mode on until `disable_batch_invariant_mode`; newer contexts decide while they last."""
    _decide_permanently(True)


def disable_batch_invariant_mode() -> None:
    """Switch the mode off, also within contexts that switched it on; newer contexts decide while they last."""
    _decide_permanently(False)


def _decide_permanently(enabled: bool) -> None:
    with _lock:
        others = [decision for decision in _decisions if not decision.permanent]
        _decide([*others, _Decision(enabled, permanent=True)] if enabled or others else [])


class set_batch_invariant_mode:  # noqa: N801  (reads as a statement: with set_batch_invariant_mode():)
    """Context manager and decorator: switch the batch-invariant mode on (or off) for a while, for the whole process.

    As a decorator of a generator or coroutine function it holds from the first step to the last, as if the body stood
    in a `with` statement. The `bikernels.use_arithmetic` and `bikernels.use_backend` contexts around the entry also
    apply in threads that have none of their own, such as those of autograd's backward pass.

    Args:
        enabled: True switches the mode on, False off.
        strict: in the mode, raise `UncoveredOperatorError` at the first operator that reduces and that the mode does
            not cover, or that it does not know. It costs some time at every product and reduction.
        portable: also take pointwise functions (exp, log, sigmoid, tanh, silu, gelu, rsqrt, sin, cos, pow and others)
            from the core on every device, so that a model has the same bits on a GPU and on a CPU in one arithmetic
            class. It costs some time at every sum, product and quotient.

    Raises:
        TypeError: `enabled`, `strict` or `portable` is not a bool (a decorator is written with parentheses).
        ValueError: `strict` or `portable` without the mode.
    """

    def __init__(self, enabled: bool = True, *, strict: bool = False, portable: bool = False) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(
                f"enabled is {enabled!r}; pass True or False (a decorator is written @set_batch_invariant_mode())"
            )
        for name, value in (("strict", strict), ("portable", portable)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; pass True or False")
            if value and not enabled:
                raise ValueError(f"{name}=True with enabled=False; only the mode can be {name}")
        self._enabled = enabled
        self._strict = strict
        self._portable = portable
        self._entered: list[tuple[int, _Decision]] = []

    def __enter__(self) -> None:
        with _lock:
            decision = _Decision(self._enabled, permanent=False, strict=self._strict, portable=self._portable)
            _decide([*_decisions, decision])
            self._entered.append((threading.get_ident(), decision))

    def __exit__(self, *exception: object) -> None:
        with _lock:
            # One object may be entered several times, also by several threads; each takes back its own last entry, and
            # a generator that ends in another thread the last one.
            own = [i for i, (thread, _) in enumerate(self._entered) if thread == threading.get_ident()]
            _, decision = self._entered.pop(own[-1] if own else -1)
            _decide([other for other in _decisions if other is not decision])

    def __call__(self, function: Callable[_P, _T]) -> Callable[_P, _T]:
        settings = {"strict": self._strict, "portable": self._portable}
        again = functools.partial(set_batch_invariant_mode, self._enabled, **settings)
        if inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__} is an asynchronous generator; use a with statement in its body")
        if inspect.isgeneratorfunction(function):
            return cast("Callable[_P, _T]", _wrap_generator(function, again))
        if inspect.iscoroutinefunction(function):
            return cast("Callable[_P, _T]", _wrap_coroutine(function, again))

        @functools.wraps(function)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with again():
                return function(*args, **kwargs)

        return wrapper


def _wrap_generator(function: Callable[..., Any], mode: Callable[[], set_batch_invariant_mode]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return (yield from function(*args, **kwargs))

    return wrapper


def _wrap_coroutine(function: Callable[..., Any], mode: Callable[[], set_batch_invariant_mode]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return await function(*args, **kwargs)

    return wrapper
