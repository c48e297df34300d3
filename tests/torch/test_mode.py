"""When the mode is on: the model stated in bikernels_torch/mode.py."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import threading
import warnings

import pytest
import torch

import bikernels
import bikernels_torch
from bikernels_torch import (
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)

from .helpers import same_bits


def is_overridden() -> bool:
    dump = torch._C._dispatch_dump("aten::mm").splitlines()
    return any(line.startswith("CPU: ") and "bikernels_torch" in line for line in dump)


def assert_on(expected: bool) -> None:
    assert is_batch_invariant_mode_enabled() is expected
    assert is_overridden() is expected


def test_context() -> None:
    assert_on(False)
    with set_batch_invariant_mode():
        assert_on(True)
    assert_on(False)


def test_nested() -> None:
    with set_batch_invariant_mode():
        with set_batch_invariant_mode(True):
            assert_on(True)
        assert_on(True)
        with set_batch_invariant_mode(False):
            assert_on(False)
            with set_batch_invariant_mode():
                assert_on(True)
            assert_on(False)
        assert_on(True)
    assert_on(False)


def test_contexts_end_in_any_order() -> None:
    """Whatever the order, the newest entry that is left decides."""
    for flags in itertools.product((True, False), repeat=3):
        for order in itertools.permutations(range(3)):
            contexts = [set_batch_invariant_mode(flag) for flag in flags]
            for context in contexts:
                context.__enter__()
            left = [0, 1, 2]
            for i in order:
                assert_on(flags[left[-1]])
                contexts[i].__exit__(None, None, None)
                left.remove(i)
            assert_on(False)


def test_exception() -> None:
    with pytest.raises(ZeroDivisionError), set_batch_invariant_mode():
        torch.empty(1).resize_(1 // 0)
    assert_on(False)
    with pytest.raises(RuntimeError), set_batch_invariant_mode():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert_on(False)


def test_enable_and_disable() -> None:
    enable_batch_invariant_mode()
    assert_on(True)
    enable_batch_invariant_mode()  # no second entry
    with set_batch_invariant_mode(False):
        assert_on(False)
    assert_on(True)
    disable_batch_invariant_mode()
    assert_on(False)
    disable_batch_invariant_mode()
    assert_on(False)


def test_disabling_within_a_context_stays() -> None:
    with set_batch_invariant_mode():
        disable_batch_invariant_mode()
        assert_on(False)
    assert_on(False)
    with set_batch_invariant_mode():
        assert_on(True)
        with set_batch_invariant_mode():
            disable_batch_invariant_mode()
        assert_on(False)


def test_enabling_within_a_context_stays() -> None:
    with set_batch_invariant_mode(False):
        enable_batch_invariant_mode()
        assert_on(True)
    assert_on(True)
    disable_batch_invariant_mode()
    assert_on(False)


def test_one_object_entered_twice() -> None:
    context = set_batch_invariant_mode()
    with context:
        with context:
            assert_on(True)
        assert_on(True)
    assert_on(False)


def test_decorator() -> None:
    @set_batch_invariant_mode()
    def call(depth: int) -> bool:
        """Its docstring."""
        return call(depth - 1) if depth else is_batch_invariant_mode_enabled()

    assert call(3)
    assert call.__doc__ == "Its docstring."
    assert_on(False)

    @set_batch_invariant_mode(False)
    def off() -> bool:
        return is_batch_invariant_mode_enabled()

    with set_batch_invariant_mode():
        assert not off()
        assert_on(True)


def test_decorated_generator() -> None:
    @set_batch_invariant_mode()
    def generate():
        received = yield is_batch_invariant_mode_enabled()
        yield received
        return 7

    assert list(generate()) == [True, None]
    assert_on(False)
    generator = generate()
    assert next(generator)
    assert generator.send(3) == 3
    with pytest.raises(StopIteration, match="7"):
        next(generator)
    assert_on(False)
    unfinished = generate()
    next(unfinished)
    assert_on(True)
    unfinished.close()
    assert_on(False)


def test_decorated_coroutine() -> None:
    @set_batch_invariant_mode()
    async def call() -> bool:
        await asyncio.sleep(0)
        return is_batch_invariant_mode_enabled()

    assert asyncio.run(call())
    assert_on(False)


def test_decorated_asynchronous_generator() -> None:
    async def generate():
        yield 1

    with pytest.raises(TypeError, match="asynchronous generator"):
        set_batch_invariant_mode()(generate)


@pytest.mark.parametrize("enabled", [None, 1, "on", print])
def test_enabled_is_a_bool(enabled: object) -> None:
    with pytest.raises(TypeError, match="enabled is"):
        set_batch_invariant_mode(enabled)


def test_suspended_generator() -> None:
    """A generator suspended within its context keeps the mode on, and ends its own entry only."""

    def generate():
        with set_batch_invariant_mode():
            yield 1
            yield 2

    generator = generate()
    next(generator)
    assert_on(True)
    with set_batch_invariant_mode(False):
        assert_on(False)
        del generator
        gc.collect()
        assert_on(False)
    assert_on(False)


def test_threads() -> None:
    """Random entries in many threads: on within one's own, off when all have ended."""
    failures = []

    def work(seed: int) -> None:
        choice = random.Random(seed)
        a = torch.randn(3, 5)
        try:
            for _ in range(20):
                with set_batch_invariant_mode():
                    if choice.random() < 0.5:
                        with set_batch_invariant_mode():
                            assert is_batch_invariant_mode_enabled()
                    assert is_batch_invariant_mode_enabled()
                    torch.mm(a, a.T)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_on(False)


def test_the_mode_is_the_process_s() -> None:
    seen = []
    with set_batch_invariant_mode():
        thread = threading.Thread(target=lambda: seen.append(is_batch_invariant_mode_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_entered_here_and_left_in_another_thread() -> None:
    context = set_batch_invariant_mode()
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert_on(False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork() -> None:
    with set_batch_invariant_mode():
        child = os.fork()
        if child == 0:
            inherited = is_batch_invariant_mode_enabled()
            with set_batch_invariant_mode(False):
                left = not is_batch_invariant_mode_enabled()
            os._exit(0 if inherited and left else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0


def test_a_failed_entry_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no")

    monkeypatch.setattr("bikernels_torch.compiled.install", fail)
    with pytest.raises(OSError, match="no"), set_batch_invariant_mode():
        pass
    assert_on(False)
    assert torch.backends.mha.get_fastpath_enabled()


def test_standard_behaviour_returns() -> None:
    """The same bytes and switches as before the mode."""
    a, b, x = torch.randn(33, 257), torch.randn(257, 65), torch.randn(37)
    q = torch.randn(2, 4, 33, 16)

    def standard() -> list[torch.Tensor]:
        attention = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return [a @ b, a.softmax(0), a.mean(1), torch.nn.functional.silu(x), attention]

    before = standard()
    with set_batch_invariant_mode():
        within = standard()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    for x_before, x_after in zip(before, standard(), strict=True):
        assert same_bits(x_before, x_after)
    assert any(not same_bits(x_before, x_within) for x_before, x_within in zip(before, within, strict=True))


def test_fast_path_stays_off_where_it_was_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with set_batch_invariant_mode():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_no_warning_even_where_torch_always_warns() -> None:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with set_batch_invariant_mode():
                torch.ones(2, 2) @ torch.ones(2, 2)
    finally:
        torch.set_warn_always(always)


def test_settings_of_the_entry_reach_other_threads() -> None:
    """use_arithmetic around the entry applies where a thread has no context of its own, and yields to one that has."""
    a, b = torch.randn(64, 512).bfloat16(), torch.randn(512, 64).bfloat16()
    a[:, 0], a[:, -1], b[0], b[-1] = 1024, -1024, 1024, 1024  # what is lost below the large products stays lost
    expected = {}
    for name in ("fma32", "tc16f25"):
        with bikernels.use_arithmetic(name):
            expected[name] = torch.ops.bikernels.mm(a, b)
    assert not same_bits(expected["fma32"], expected["tc16f25"])
    results = []

    def work() -> None:
        results.append(a @ b)
        with bikernels.use_arithmetic("fma32"):
            results.append(a @ b)

    with bikernels.use_arithmetic("tc16f25"), set_batch_invariant_mode():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert same_bits(results[0], expected["tc16f25"])
    assert same_bits(results[1], expected["fma32"])


def test_attention_block_size() -> None:
    size = bikernels_torch.get_batch_invariant_attention_block_size()
    assert (size.block_m, size.block_n) == (16, 16) == size
    assert bikernels_torch.__version__ == bikernels.__version__
