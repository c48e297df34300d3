"""Which of PyTorch's operators that multiply matrices the mode computes: all of them, but for a list with reasons."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bikernels_torch import set_batch_invariant_mode
from bikernels_torch.overrides import BELOW_AUTOGRAD, COMPOSITES, CPU_KERNELS, KERNELS

MULTIPLIES = re.compile(
    "mm|mv|dot|matmul|addr|linear|einsum|outer|ger$|gemm|conv|lstm|gru|rnn|attention|encoder|cdist|kron|inner|matrix_exp"
)
"""In the names of operators that multiply matrices, in the hope that a new one is called like an old one."""

NOT_PRODUCTS = re.compile(
    "gamma|hamming|dummy|cummax|cummin|convert_indices|convert_weight|dimV|upsample|linear_combination|flatten_weight"
)
"""Names that only look so: interpolation, conversions of formats, the packing of weights."""

LEFT_TO_PYTORCH: dict[str, str] = {
    # Refused by the docs, or exact.
    "_int_mm": "integers: exact in any order",
    "_scaled_mm": "fp8",
    "_scaled_mm_v2": "fp8",
    "_scaled_grouped_mm": "fp8",
    "_scaled_grouped_mm_v2": "fp8",
    # Quantized weights, in formats of their own.
    "_dyn_quant_matmul_4bit": "quantized",
    "_mixed_dtypes_linear": "quantized",
    "_weight_int4pack_mm": "quantized",
    "_weight_int4pack_mm_for_cpu": "quantized",
    "_weight_int4pack_mm_with_scales_and_zeros": "quantized",
    "_weight_int8pack_mm": "quantized",
    "quantized_gru": "quantized",
    "quantized_lstm": "quantized",
    # Sparse operands; their kernels belong to sparse tensors.
    "_cslt_sparse_mm": "sparse",
    "_cslt_sparse_mm_search": "sparse",
    "_sparse_addmm": "sparse",
    "_sparse_mm_reduce_impl": "sparse",
    "_sparse_mm_reduce_impl_backward": "sparse",
    "_sparse_semi_structured_addmm": "sparse",
    "_sparse_semi_structured_linear": "sparse",
    "_sparse_semi_structured_mm": "sparse",
    "_sparse_sparse_matmul": "sparse",
    "hspmm": "sparse",
    "sparse_sampled_addmm": "sparse",
    "sspaddmm": "sparse",
    # Layouts and devices other than strided tensors on a CPU or a CUDA GPU.
    "linear_backward": "nested tensors and MPS",
    "matmul_backward": "nested tensors",
    "mkldnn_linear": "mkldnn layout",
    "mkldnn_linear_backward": "mkldnn layout",
    "mkldnn_linear_backward_input": "mkldnn layout",
    "mkldnn_linear_backward_weights": "mkldnn layout",
    # Fused attention: never reached from scaled_dot_product_attention or a module in the mode, only by name.
    "_cudnn_attention_backward": "by name only",
    "_cudnn_attention_forward": "by name only",
    "_efficient_attention_backward": "by name only",
    "_efficient_attention_forward": "by name only",
    "_flash_attention_backward": "by name only",
    "_flash_attention_forward": "by name only",
    "_flash_attention_forward_no_dropout_inplace": "by name only",
    "_native_multi_head_attention": "by name only",
    "_scaled_dot_product_cudnn_attention": "by name only",
    "_scaled_dot_product_cudnn_attention_backward": "by name only",
    "_scaled_dot_product_efficient_attention": "by name only",
    "_scaled_dot_product_efficient_attention_backward": "by name only",
    "_scaled_dot_product_flash_attention": "by name only",
    "_scaled_dot_product_flash_attention_backward": "by name only",
    "_scaled_dot_product_flash_attention_for_cpu": "by name only",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "by name only",
    "_scaled_dot_product_fused_attention_overrideable": "other devices",
    "_scaled_dot_product_fused_attention_overrideable_backward": "other devices",
    "_transformer_encoder_layer_fwd": "by name only",
    "_triton_multi_head_attention": "by name only",
    "_triton_scaled_dot_attention": "by name only",
    # Fused recurrent layers: lstm, gru and rnn do not come to them in the mode.
    "_cudnn_rnn": "by name only",
    "_cudnn_rnn_backward": "by name only",
    "mkldnn_rnn_layer": "by name only",
    "mkldnn_rnn_layer_backward": "by name only",
    # The pointwise part of a cell.
    "_thnn_fused_gru_cell": "pointwise",
    "_thnn_fused_gru_cell_backward": "pointwise",
    "_thnn_fused_lstm_cell": "pointwise",
    "_thnn_fused_lstm_cell_backward_impl": "pointwise",
    # Made of covered operators, inside their own kernels.
    "_trilinear": "made of bmm",
    "addr_": "made of addr.out",
    "linalg_matrix_exp": "not covered: how it goes about follows from the whole batch",
    "_cdist_forward": "from differences, one pair at a time",
    "_cdist_backward": "from differences, one pair at a time",
}
"""Operator (each of its overloads) -> why the mode leaves it alone; convolutions are below."""

ELSEWHERE = re.compile("conv|mps|miopen")
"""Convolutions, which are not replaced (docs/pytorch.md), and the operators of other devices."""


def not_composite() -> dict[str, str]:
    """Overloads that multiply and have kernels of their own -> operator; PyTorch makes the others of these."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        full = f"{schema.name}.{schema.overload_name}".rstrip(".")
        if not schema.name.startswith("aten::") or not MULTIPLIES.search(name) or NOT_PRODUCTS.search(name):
            continue
        # What the dispatcher does not know is TorchScript's alone.
        if torch._C._dispatch_has_kernel(full) and not torch._C._dispatch_has_kernel_for_dispatch_key(
            full, "CompositeImplicitAutograd"
        ):
            found[full.removeprefix("aten::")] = name
    return found


def test_every_product_is_covered_or_listed() -> None:
    covered = {**KERNELS, **CPU_KERNELS, **COMPOSITES}
    missing = [
        overload
        for overload, name in not_composite().items()
        if overload not in covered and name not in LEFT_TO_PYTORCH and not ELSEWHERE.search(name)
    ]
    assert not missing


def test_the_walk_notices() -> None:
    """It sees the overloads of every covered product, so it would see one that is not covered."""
    seen = not_composite()
    assert len(seen) > 100
    assert set(seen) >= {"mm", "mm.out", "mm.dtype", "addmm_", "baddbmm.dtype_out", "addmv.out", "dot", "_grouped_mm"}
    assert {"_int_mm", "_scaled_mm", "_cudnn_rnn", "_flash_attention_forward", "_weight_int8pack_mm"} <= set(seen)


def test_the_list_has_no_covered_operator() -> None:
    assert not set(LEFT_TO_PYTORCH) & {name.split(".")[0] for name in {**KERNELS, **CPU_KERNELS, **COMPOSITES}}


# ------------------------------------------------------------------------------------------ what runs when it is called

CALLS: dict[str, Callable[[torch.Tensor], object]] = {
    "matmul": lambda x: x @ x.mT,
    "linear": lambda x: F.linear(x, x[0], x[0, :, 0]),
    "einsum of two": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "einsum of three": lambda x: torch.einsum("bij,bkj,bkl->bil", x, x, x),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),
    "inner": lambda x: torch.inner(x, x),
    "multi_dot": lambda x: torch.linalg.multi_dot([x[0], x[1].T, x[2]]),
    "chain_matmul": lambda x: torch.ops.aten.chain_matmul([x[0], x[1].T, x[2]]),
    "vecdot": lambda x: torch.linalg.vecdot(x, x),
    "vecdot of one pair": lambda x: torch.linalg.vecdot(x[0, 0], x[0, 1]),
    "matrix_power": lambda x: torch.linalg.matrix_power(x[:, :, :5], 3),
    "bilinear": lambda x: F.bilinear(x[0], x[1], x.new_ones(4, 8, 8)),
    "cov": lambda x: torch.cov(x[0]),
    "cdist by product": lambda x: torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist"),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention, 4-D": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "attention, grouped": lambda x: F.scaled_dot_product_attention(x[None], x[None, :1], x[None, :1], enable_gqa=True),
    "MultiheadAttention": lambda x: nn.MultiheadAttention(8, 2, batch_first=True).to(x.device).eval()(x, x, x),
    "TransformerEncoderLayer": lambda x: nn.TransformerEncoderLayer(8, 2, 9, batch_first=True).to(x.device).eval()(x),
    "Transformer": lambda x: nn.Transformer(8, 2, 1, 1, 9, batch_first=True).to(x.device).eval()(x, x),
    "LSTM": lambda x: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True).to(x.device)(x),
    "LSTM, projected": lambda x: nn.LSTM(8, 6, proj_size=3).to(x.device)(x),
    "GRU": lambda x: nn.GRU(8, 6).to(x.device)(x),
    "RNN": lambda x: nn.RNN(8, 6).to(x.device)(x),
    "LSTMCell": lambda x: nn.LSTMCell(8, 6).to(x.device)(x[0]),
    "GRUCell": lambda x: nn.GRUCell(8, 6).to(x.device)(x[0]),
}


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("name", CALLS)
def test_what_runs(name: str, device: str) -> None:
    """Without gradients, when PyTorch prefers fused kernels: covered products, and none of the list.

    A linear is then a kernel of the mode by itself, and so is attention of few queries on a GPU.
    """
    x = torch.randn(3, 5, 8, device=device)
    with torch.no_grad(), set_batch_invariant_mode(), torch.profiler.profile() as profile:
        CALLS[name](x)
    ran = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    assert ran & {"mm", "bmm", "addmm", "mv", "dot", "vdot", "attention", *BELOW_AUTOGRAD}
    assert not ran & {operator for operator, why in LEFT_TO_PYTORCH.items() if why == "by name only"}


def test_switches_return() -> None:
    """What the mode switches off for the process is as it was afterwards, off or on."""
    fast, optimised = torch.backends.mha, torch.backends.opt_einsum
    before = fast.get_fastpath_enabled(), optimised.enabled
    try:
        for given in (False, fast.get_fastpath_enabled()):
            fast.set_fastpath_enabled(given)
            optimised.enabled = given and optimised.is_available()
            standard = fast.get_fastpath_enabled(), optimised.enabled
            with set_batch_invariant_mode():
                assert (fast.get_fastpath_enabled(), optimised.enabled) == (False, False)
            assert (fast.get_fastpath_enabled(), optimised.enabled) == standard
    finally:
        fast.set_fastpath_enabled(before[0])
        optimised.enabled = before[1]
