"""Compiled functions of the CPU backend on disk: no process ever finds another function's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bikernels.backend.cpu import compile as compiler

SIGNATURE, TARGET = "(int64,) -> none", ("x86_64", "a CPU", "")
FIRST, SECOND = ((SIGNATURE, TARGET, name, "sources") for name in ("sigmoid_backward", "silu_backward"))


class _Began(compiler._Files):
    """Those of a process that looked for what there is before the other process wrote anything."""

    def _load_index(self) -> dict[Any, Any]:
        return {}


class _Interrupted(compiler._Files):
    """Those of a process that has to wait, before it writes code, until the other has written its own."""

    def _save_data(self, name: str, data: Any) -> None:
        _Began(*where(Path(self._cache_path))).save(SECOND, "code of the second")
        super()._save_data(name, data)


def where(folder: Path) -> tuple[str, str, str]:
    return str(folder), "loop", "a date"


def test_processes_that_add_at_once(tmp_path: Path) -> None:
    _Interrupted(*where(tmp_path)).save(FIRST, "code of the first")
    fresh = compiler._Files(*where(tmp_path))
    assert [fresh.load(key) for key in (FIRST, SECOND)] == ["code of the first", "code of the second"]
    assert compiler._Files(str(tmp_path), "loop", "another date").load(FIRST) is None
