"""torch.compile in the mode: what inductor would compute in an order of its own stays what eager mode runs.

Inductor generates kernels that never meet the mode's overrides. So while the mode is on its backend gets other
decompositions: every ATen operator that is more than a copy or a correctly rounded arithmetic operation becomes, while
the graph is traced, an operator of the same name in `torch.ops.bikernels_eager`. Inductor does not look into those, and
they run PyTorch's operator, hence the mode's override. What is left is fused as ever, and cannot change a bit.

A compiled function holds graphs for either state of the mode and never runs one in the other:

- Dynamo finds a function's graphs by their backend, and is given another backend while the mode is on.
- Backward passes and graphs called otherwise are checked when they run: `CompiledInModeError`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from bikernels import BikernelsError

_LIMITS = (
    'Call the model uncompiled, compile it with backend="aot_eager", or leave the mode around this call '
    "(with bikernels_torch.set_batch_invariant_mode(False):)."
)


class CompiledInModeError(BikernelsError):
    """Something compiled cannot run in the present state of the batch-invariant mode."""


# ----------------------------------------------------------------------------------------------- what inductor may fuse

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_ROUNDS_LIKE_EAGER = _VERSION >= (2, 13)
"""Whether inductor can be told to round every half-precision step and not to contract a product and a sum."""

_COPIES = frozenset(
    ["_unsafe_view", "alias_copy", "arange", "as_strided_scatter", "bitwise_and", "bitwise_not", "bitwise_or",
     "bitwise_xor", "cat", "clone", "constant_pad_nd", "diagonal_scatter", "embedding", "empty", "empty_like",
     "empty_permuted", "empty_strided", "eq", "flip", "full", "full_like", "gather", "ge", "gt", "index",
     "index_select", "iota", "isnan", "le", "lift_fresh_copy", "logical_and", "logical_not", "logical_or",
     "logical_xor", "lt", "masked_fill", "ne", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros",
     "ones", "ones_like", "repeat", "rev", "roll", "scalar_tensor", "select_scatter", "slice_scatter", "stack", "tril",
     "triu", "where", "zeros", "zeros_like"]
)  # fmt: skip
"""Operators that move values, compare them or make constants."""

_CONSTANTS = frozenset(["constant_pad_nd", "full", "full_like", "masked_fill", "new_full", "scalar_tensor", "where"])
_CASTS = frozenset(["_to_copy", "convert_element_type", "copy"])
_ARITHMETIC = frozenset(["abs", "add", "mul", "neg", "sub"])
"""Rounded once, to nearest, by every implementation."""

_BOOKKEEPING = frozenset(
    ["_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_local_scalar_dense", "copy_", "device_put",
     "sym_constrain_range", "sym_constrain_range_for_size", "sym_numel", "sym_size", "sym_storage_offset", "sym_stride"]
)  # fmt: skip

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.float64)


def _name(operator: Any) -> str:
    return operator._schema.name.partition("::")[2]


def _is_view(operator: Any) -> bool:
    schema = operator._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def _may_fuse(operator: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether inductor's code for this call gives the bytes of PyTorch's kernel, whatever it is fused with."""
    name = _name(operator)
    if _is_view(operator) or name in _BOOKKEEPING:
        return True
    given = (*arguments, *keywords.values())
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    numbers = [x for x in given if isinstance(x, int | float | complex | torch.SymInt | torch.SymFloat)]
    dtypes = {x.dtype for x in tensors} | {x for x in given if isinstance(x, torch.dtype)}
    if name in ("arange", "iota"):
        floats = (float, torch.SymFloat)
        return not any(x.is_floating_point for x in dtypes) and not any(isinstance(x, floats) for x in numbers)
    if name in _COPIES:
        return name not in _CONSTANTS or not dtypes & {*_HALVES} or all(_is_exact_in_half(x) for x in numbers)
    if name in _CASTS:
        return _may_fuse_cast(tensors, dtypes)
    if name not in _ARITHMETIC or operator._overloadname not in ("default", "Tensor", "Scalar") or not tensors:
        return False
    return _may_fuse_arithmetic(name, tensors, numbers, dtypes)


def _is_exact_in_half(x: Any) -> bool:
    """Whether a constant is the same in every dtype; inductor does not round it to half precision."""
    return isinstance(x, int | float) and (math.isinf(x) or (float(x).is_integer() and abs(x) <= 256))


def _may_fuse_cast(tensors: Sequence[torch.Tensor], dtypes: set[torch.dtype]) -> bool:
    if len(dtypes) == 1:
        return True
    if dtypes & {*_HALVES}:
        return _ROUNDS_LIKE_EAGER and dtypes <= {*_HALVES, *_FLOATS}
    # Of a float that has no place among the integers every implementation makes another one.
    return not tensors[-1].dtype.is_floating_point or dtypes <= {*_FLOATS, torch.bool}


def _may_fuse_arithmetic(
    name: str, tensors: Sequence[torch.Tensor], numbers: Sequence[Any], dtypes: set[torch.dtype]
) -> bool:
    if not any(x.is_floating_point or x.is_complex for x in dtypes):
        return not any(isinstance(x, float | complex | torch.SymFloat) for x in numbers)
    if len(dtypes) != 1 or len(tensors) + len(numbers) > (1 if name in ("abs", "neg") else 2):
        return False  # alpha is a number too many
    if dtypes <= {*_HALVES}:
        return _ROUNDS_LIKE_EAGER and not numbers  # PyTorch's kernels do not agree on how to round such a number
    # A product fused with a sum is one instruction on a GPU unless inductor is told not to.
    return dtypes <= {*_FLOATS} and (name != "mul" or tensors[0].device.type == "cpu" or _ROUNDS_LIKE_EAGER)


# -------------------------------------------------------------------------------------------- torch.ops.bikernels_eager

_library = torch.library.Library("bikernels_eager", "DEF")
_opaque: dict[tuple[Any, tuple[str, ...]], Any] = {}
_opaque_lock = threading.Lock()


def _opaque_operator(operator: Any, arguments: Sequence[Any]) -> Any:
    """torch.ops.bikernels_eager's operator for one of ATen's: the same arguments and results, opaque to compilers."""
    # ATen's operators take a number in a tensor's place, where it has less of a say in the dtype. Others need a schema.
    pairs = zip(operator._schema.arguments, arguments, strict=False)
    numbers = tuple(x.name for x, given in pairs if str(x.type) == "Tensor" and not isinstance(given, torch.Tensor))
    key = operator, numbers
    with _opaque_lock:
        if key not in _opaque:
            _opaque[key] = _define_opaque(operator, numbers)
        return _opaque[key]


def _define_opaque(operator: Any, numbers: tuple[str, ...]) -> Any:
    from .overrides import FAKES, kernels

    aten_name, _, signature = str(operator._schema).removeprefix("aten::").partition("(")
    for argument in numbers:
        signature = re.sub(rf"\bTensor {argument}\b", f"Scalar {argument}", signature)
    # Not overloads of one name: PyTorch aborts at exit when it takes back several of them.
    name = "_".join((aten_name.replace(".", "_"), *numbers))
    replaced = any(aten_name in kernels(device) for device in ("cpu", "cuda"))

    def run(compute: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        result = compute(*arguments, **keywords)
        # The strides of a result are compiled in, and an override's are not always those of PyTorch's kernel.
        if not replaced:
            return result
        if isinstance(result, torch.Tensor):
            return result.contiguous()
        return tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in result)

    exact_strides = torch.Tag.needs_exact_strides  # PyTorch's kernels may choose their way by the strides
    _library.define(name + "(" + signature, tags=(torch.Tag.pt2_compliant_tag, exact_strides, *_kept_tags(operator)))
    _library.impl(name, functools.partial(run, operator), "CompositeExplicitAutograd")
    fake = functools.partial(run, FAKES.get(aten_name, operator))
    torch.library.register_fake(f"bikernels_eager::{name}", fake, lib=_library)
    return getattr(torch.ops.bikernels_eager, name).default


def _kept_tags(operator: Any) -> list[torch.Tag]:
    kept = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    return [tag for tag in kept if tag in operator.tags]


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's table for the mode: one entry for each of ATen's operators that a trace can meet."""
    from torch._inductor.decomposition import select_decomp_table

    standard = select_decomp_table()
    table: dict[Any, Callable[..., Any]] = {op: f for op, f in standard.items() if op.namespace != "aten"}
    for qualified in torch._C._dispatch_get_all_op_names():
        if not qualified.startswith("aten::"):
            continue
        base, _, overload = qualified.removeprefix("aten::").partition(".")
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operator is None or operator._schema.is_mutable:
            continue  # made functional before it is decomposed
        if not _has_kernel_of_its_own(qualified):
            continue  # made of others, in eager mode too
        table[operator] = functools.partial(_decompose, operator, standard.get(operator))
    return table


def _has_kernel_of_its_own(qualified: str) -> bool:
    from .overrides import BELOW_AUTOGRAD

    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, qualified)
    if qualified.removeprefix("aten::") in BELOW_AUTOGRAD:  # the kernel is ours
        return False
    return has_kernel("CPU") or has_kernel("CUDA") or not has_kernel("CompositeImplicitAutograd")


@contextlib.contextmanager
def _keeping_kernels() -> Iterator[None]:
    """Let a trace meet operators that have a kernel beside a composition, which eager mode does not take.

    PyTorch before 2.13 takes it apart while it traces: silu_backward and mish_backward.
    """
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    kept = {
        operator: functools.partial(_keep_kernel, operator, decompose)
        for operator, decompose in _decompositions().items()
        if operator.namespace == "aten"
        and has_kernel(operator._name, composite)
        and composite not in operator.py_kernels
        and torch._C.DispatchKey.Meta in operator.py_kernels  # else its result's shape is its composition's
    }
    for operator, decompose in kept.items():
        operator.py_kernels[composite] = decompose
        operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator in kept:
            del operator.py_kernels[composite]
            operator._dispatch_cache.clear()


def _keep_kernel(operator: Any, decompose: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    devices = {x.device.type.upper() for x in arguments if isinstance(x, torch.Tensor)}
    if all(torch._C._dispatch_has_kernel_for_dispatch_key(operator._name, device) for device in devices):
        return decompose(*arguments, **keywords)
    return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *arguments, **keywords)


def _decompose(operator: Any, standard: Callable[..., Any] | None, *arguments: Any, **keywords: Any) -> Any:
    if not _may_fuse(operator, arguments, keywords):
        return _opaque_operator(operator, arguments)(*arguments, **keywords)
    return NotImplemented if standard is None else standard(*arguments, **keywords)


def _check_graph(graph: torch.fx.GraphModule) -> None:
    """Raise if something is left that inductor would compute otherwise than eager mode does."""
    left = set()
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and not _is_safe(node):
                left.add(str(node.target))
    if left:
        raise CompiledInModeError(
            "the batch-invariant mode is on, and torch.compile's inductor backend would compute "
            f"{', '.join(sorted(left))} in an order of its own. {_LIMITS}"
        )


_TRANSPARENT_HIGHER_ORDER = ("auto_functionalized", "auto_functionalized_v2", "cond", "invoke_subgraph", "while_loop",
                             "with_effects", "triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation",
                             "wrap_with_set_grad_enabled", "wrap_inductor_compiled_regions")  # fmt: skip
"""Control flow, of which the branches are checked too, and kernels that the program brought itself."""


def _is_safe(node: torch.fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() in _TRANSPARENT_HIGHER_ORDER
    if not isinstance(target, torch._ops.OpOverload):
        return True  # arithmetic on sizes, getitem
    if target.namespace in ("aten", "prims"):
        arguments, keywords = torch.fx.map_arg((node.args, node.kwargs), lambda one: one.meta.get("val"))
        return _may_fuse(target, arguments, keywords)
    return target.namespace not in ("inductor_prims", "quantized", "mkldnn", "onednn")


# --------------------------------------------------------------------------------------------------- the mode's backend

_SETTINGS = {
    "pattern_matcher": False,  # replaces operators by others, products and casts among them
    "joint_graph_constant_folding": False,
    "freezing": False,
    "layout_optimization": False,  # convolutions choose their algorithm by the layout
    "fallback_random": True,  # PyTorch's random numbers
    "emulate_precision_casts": _ROUNDS_LIKE_EAGER,
    "eager_numerics.disable_ftz": True,
}
"""Of inductor, where it has them."""

_compiling = threading.local()


@contextlib.contextmanager
def _allowing_inductor() -> Iterator[None]:
    before = getattr(_compiling, "allowed", False)
    _compiling.allowed = True
    try:
        yield
    finally:
        _compiling.allowed = before


class _ModeBackend:
    """A backend of torch.compile for the while that the mode is on; Dynamo keeps its graphs apart by its identity."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._innermost = _innermost(backend)
        self.__name__ = getattr(self._innermost, "__name__", type(self._innermost).__name__)
        if hasattr(backend, "get_compiler_config"):
            self.get_compiler_config = backend.get_compiler_config

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **keywords: Any) -> Any:
        _require(True)
        if not _is_inductor(self._innermost):
            return self._backend(graph, inputs, **keywords)
        options = {**getattr(self._innermost, "config", {}), **(keywords.pop("config_patches", None) or {})}
        return _compile(graph, inputs, options, **keywords)


def is_tracing() -> bool:
    """Whether this thread traces a graph for inductor, in the mode."""
    return getattr(_compiling, "allowed", False)


def _innermost(backend: Any) -> Any:
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def _is_inductor(backend: Any) -> bool:
    return isinstance(backend, torch._TorchCompileInductorWrapper) or (
        getattr(backend, "__module__", None) == "torch._dynamo.backends.inductor"
    )


def _compile(graph: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], **keywords: Any) -> Any:
    import torch._functorch.config
    from torch._inductor import compile_fx, config

    settings = {name: value for name, value in _SETTINGS.items() if name in config.get_config_copy()}
    # AOTAutograd's cache knows a graph by what it was before it was decomposed; inductor's own cache by what it became.
    without_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with _allowing_inductor(), _keeping_kernels(), without_cache:
        return compile_fx.compile_fx(
            graph,
            inputs,
            inner_compile=_compile_graph,
            config_patches={**options, **settings},
            decompositions=_decompositions(),
            **keywords,
        )


def _compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **keywords: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner

    _check_graph(graph)
    keywords.pop("get_decomp_fn", None)
    compiled: Any = compile_fx_inner(graph, inputs, **keywords)
    if hasattr(compiled, "current_callable"):
        compiled.current_callable = _OnlyInMode(compiled.current_callable)
        return compiled
    guarded = _OnlyInMode(compiled)
    guarded._boxed_call = getattr(compiled, "_boxed_call", False)
    return guarded


class _OnlyInMode:
    """A graph that was compiled in the mode."""

    _boxed_call: bool

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        _require(True)
        return self._function(*arguments)


# ------------------------------------------------------------------------------------------------ the state of the mode

_on = False


def _require(on: bool) -> None:
    if _on is on:
        return
    compiled, now = ("on", "off") if on else ("off", "on")
    raise CompiledInModeError(
        f"the batch-invariant mode is {now}, and a graph is running that was compiled while it was {compiled}. Run the "
        "backward pass in the mode of its forward pass, and switch the mode outside compiled functions. "
        "Otherwise: call the model uncompiled."
    )


def install() -> Callable[[], None]:
    """From now on graphs are compiled for the mode; the returned function ends that."""
    global _on
    undo: list[Callable[[], None]] = []

    def remove() -> None:
        global _on
        _on = False
        while undo:
            undo.pop()()

    try:
        for module, name, wrap in (
            ("torch._dynamo.eval_frame", "_callback_from_stance", _choosing_backend),
            ("torch._inductor.compile_fx", "compile_fx", _refusing_to_compile),
            ("torch._inductor.output_code", "CompiledFxGraph.__call__", _refusing_to_run),
        ):
            undo.append(_patch_once_imported(module, name, wrap))
    except BaseException:
        remove()
        raise
    _on = True
    return remove


def _choosing_backend(choose_callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that Dynamo asks for its compiler at each call of a compiled function."""

    @functools.wraps(choose_callback)
    def choose(callback: Any) -> Any:
        return _for_mode(choose_callback(_for_mode(callback)))

    return choose


def _for_mode(callback: Any) -> Any:
    """Dynamo's callback with the mode's backend in the backend's place; always the same one for one callback."""
    convert: Any = getattr(callback, "_torchdynamo_orig_backend", None)
    if not hasattr(convert, "_clone_with_backend"):
        return callback  # there is none, or it has been chosen from one of these
    backend = convert._torchdynamo_orig_backend
    if isinstance(backend, _ModeBackend):
        return callback
    if not hasattr(callback, "_bikernels_in_mode"):
        callback._bikernels_in_mode = type(callback)(convert._clone_with_backend(_ModeBackend(backend)), callback.hooks)
    return callback._bikernels_in_mode


def _refusing_to_compile(compile_fx: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_fx)
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        if not getattr(_compiling, "allowed", False):
            raise CompiledInModeError(
                "the batch-invariant mode is on, and inductor was called in a way that it does not reach: directly, or "
                f"because the mode was switched within a compiled function. {_LIMITS}"
            )
        return compile_fx(*arguments, **keywords)

    return refuse


def _refusing_to_run(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def refuse(self: Any, inputs: Sequence[Any]) -> Any:
        _require(isinstance(self.current_callable, _OnlyInMode))
        return call(self, inputs)

    return refuse


# -------------------------------------------------------------------------------------------------------------- patches


def _patch_once_imported(module: str, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace an attribute of a module, now or when it is imported: Dynamo and inductor take seconds to import."""
    if module in sys.modules:
        return _patch(sys.modules[module], name, wrap)
    undo: list[Callable[[], None]] = []
    waiting = _AfterImport(module, lambda imported: undo.append(_patch(imported, name, wrap)))
    sys.meta_path.insert(0, waiting)

    def remove() -> None:
        waiting.cancel()
        while undo:
            undo.pop()()

    return remove


def _patch(module: ModuleType, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    *path, attribute = name.split(".")
    owner = functools.reduce(getattr, path, module)
    original = getattr(owner, attribute)
    replacement = wrap(original)
    setattr(owner, attribute, replacement)

    def restore() -> None:
        if getattr(owner, attribute) is replacement:  # not if another program has patched it meanwhile
            setattr(owner, attribute, original)

    return restore


class _AfterImport(importlib.abc.MetaPathFinder):
    """Call a function once with the module of a name, right after it has been imported."""

    def __init__(self, module: str, act: Callable[[ModuleType], None]) -> None:
        self._module = module
        self._act: Callable[[ModuleType], None] | None = act

    def cancel(self) -> None:
        self._act = None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self._act is not None:
                self._act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
