"""Compiled kernels on disk, shared by processes and threads.

The folder is BIKERNELS_CACHE_DIR, by default the user's cache directory, and a temporary one if that cannot be written.
A file is complete once it has its name.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ENVIRONMENT_CACHE = "BIKERNELS_CACHE_DIR"


def folders() -> Iterator[Path]:
    """Where files may be kept, best first."""
    named = os.environ.get(ENVIRONMENT_CACHE)
    if named:
        yield Path(named)
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        yield Path(os.environ["LOCALAPPDATA"]) / "bikernels" / "cache"
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        with contextlib.suppress(RuntimeError):  # no home directory
            yield (Path(base) if base else Path.home() / ".cache") / "bikernels"
    yield _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bikernels-"))


def stored(name: str, make: Callable[[], bytes]) -> Path:
    """The path of the file `name`, made and written first unless it is there.

    Args:
        name: a file name that says all on which the content depends, by a hash for instance.
        make: computes the content; called at most once.

    Raises:
        OSError: no folder can be written.
    """
    content: bytes | None = None
    for folder in folders():
        path = folder / name
        if path.is_file():
            return path
        if content is None:
            content = make()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError:
            continue
        return path
    raise OSError(f"no folder can be written for compiled kernels; set {ENVIRONMENT_CACHE} to one that can")
