"""Where in a program an operator is called: the module's path and the line of source, read off the Python stack."""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType
from typing import Any, NamedTuple

import torch

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class Place(NamedTuple):
    """A call's place; what is not known is ""."""

    module: str
    """The path of the innermost module, as in `named_modules`: "layers.3.mlp.down_proj"; "" for the model itself."""
    module_class: str
    """That module's class; "" outside any module."""
    file: str
    line: int
    source: str
    """The innermost line of source outside PyTorch."""

    def __str__(self) -> str:
        module = self.module or self.module_class
        line = f"{os.path.basename(self.file)}:{self.line}" if self.file else ""
        return ", ".join(part for part in (module, line) if part) or "unknown place"


class Locator:
    """Finds the place of the call that is under way in this thread. It remembers the names of the modules it met."""

    def __init__(self) -> None:
        self._names: dict[int, dict[int, str]] = {}
        self._roots: list[torch.nn.Module] = []  # keeps them alive, so that an id names one module

    def __call__(self, skip: str = "") -> Place:
        """The place of the caller; frames of the file `skip` are passed over like those of PyTorch."""
        modules: list[torch.nn.Module] = []
        file, line = "", 0
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(_TORCH):
                if frame.f_code.co_name == "_call_impl":
                    module = frame.f_locals.get("self")
                    if isinstance(module, torch.nn.Module):
                        modules.append(module)
            elif not file and not name.startswith((_OURS, "<")) and name != skip:
                file, line = name, frame.f_lineno
            frame = frame.f_back
        path, module_class = "", ""
        if modules:
            path, module_class = self._path(modules[-1], modules[0]), type(modules[0]).__name__
        return Place(path, module_class, file, line, linecache.getline(file, line).strip() if file else "")

    def _path(self, root: torch.nn.Module, module: torch.nn.Module) -> str:
        names: Any = self._names.get(id(root))
        if names is None:
            names = self._names[id(root)] = {id(each): name for name, each in root.named_modules()}
            self._roots.append(root)
        return names.get(id(module), type(module).__name__)
