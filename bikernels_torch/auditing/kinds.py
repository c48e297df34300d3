"""What an operator does to the rows of a batch, by its name and, for a few, by its arguments.

Rules of this file: EXACT and POINTWISE together are the operators known to compute every row from that row alone;
REDUCTIONS are those that add up or multiply up several elements in an order of PyTorch's choosing. What stands in no
table is UNKNOWN: a new operator of PyTorch, or one of another library, has to be looked at before it is trusted.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .. import core, overrides


class Kind(enum.Enum):
    """How the elements of an operator's result come about."""

    EXACT = "copied, selected, compared or rounded once"
    POINTWISE = "computed from one element of each input, or a fixed few"
    REDUCES = "adds up several elements, in an order that may depend on the batch"
    RANDOM = "random"
    UNKNOWN = "not in bikernels' tables of operators"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


EXACT = _names("""
    abs add alias all allclose amax amin aminmax _aminmax any arange argmax argmin as_strided as_strided_scatter
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag bucketize cat ceil
    _chunk_cat channel_shuffle clamp clamp_max clamp_min clip clone complex conj_physical _conj_physical constant_pad_nd
    contiguous copy copysign _copy_from _copy_from_and_resize cummax _cummax_helper cummin _cummin_helper detach
    diag_embed diagonal_backward diagonal_scatter div embedding empty empty_like empty_permuted empty_strided eq equal
    eye fill flip floor floor_divide fmax fmin fmod frac from_file full full_like gather ge gt hardshrink
    hardshrink_backward hardtanh hardtanh_backward heaviside im2col index index_copy index_fill index_put
    _index_put_impl index_select isfinite isin isinf isnan isneginf isposinf is_coalesced is_pinned is_same_size
    is_set_to kthvalue _lazy_clone le leaky_relu leaky_relu_backward lift lift_fresh linspace _local_scalar_dense
    logical_and logical_not logical_or logical_xor logspace lt masked_fill _masked_scale masked_scatter masked_select
    max maximum max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d median min minimum mode mul
    nan_to_num nanmedian native_channel_shuffle ne neg new_empty new_empty_strided new_full new_ones new_zeros
    _new_zeros_with_same_feature_meta nextafter nonzero nonzero_static ones ones_like _pack_padded_sequence
    _padded_dense_to_jagged_forward _jagged_to_padded_dense_forward _pin_memory pixel_shuffle pixel_unshuffle positive
    _prelu_kernel put range reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu repeat repeat_interleave
    replication_pad1d replication_pad2d replication_pad3d _reshape_alias _reshape_copy resize resize_as _resize_output
    roll rot90 round rsub scalar_tensor scatter searchsorted select_backward select_scatter set sgn sign signbit
    slice_backward slice_scatter sort sqrt square squeeze _stack stack sub t take threshold threshold_backward _to_copy
    topk to_padded_tensor transpose tril tril_indices triu triu_indices true_divide trunc _unique _unique2
    unique_consecutive unique_dim unique_dim_consecutive _unsafe_index _unsafe_index_put _unsafe_masked_index
    unsafe_split unsafe_split_with_sizes _unsafe_view unsqueeze upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d where zero zeros zeros_like
    __ilshift__ __irshift__ __ixor__ __lshift__ __rshift__ __xor__ adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d fractional_max_pool3d to_dense _to_dense values masked_select_backward _efficientzerotensor
    bartlett_window blackman_window hamming_window hann_window kaiser_window fft_fftfreq fft_rfftfreq count_nonzero
    bincount nll_loss_backward nll_loss2d_backward gcd lcm _amp_foreach_non_finite_check_and_unscale _amp_update_scale
    _is_all_true _is_any_true _has_same_storage_numel _assert_async _assert_scalar _assert_tensor_metadata
    _functional_assert_async _functional_assert_scalar sym_constrain_range sym_constrain_range_for_size
    _functional_sym_constrain_range _functional_sym_constrain_range_for_size _print _make_dep_token _linalg_check_errors
    dense_dim int_repr hash_tensor _fused_sdp_choice _cudnn_rnn_flatten_weight _use_cudnn_ctc_loss
    _convert_indices_from_coo_to_csr _convert_indices_from_csr_to_coo record_stream _nested_tensor_size _spdiags
    lu_unpack _has_compatible_shallow_copy_type _add_relu
""")
"""Copies, selections, comparisons, and what IEEE 754 rounds correctly: the same bits however a loop is vectorised.

Where an operator selects by value (sort, topk, argmax) equal values may be told apart otherwise."""

POINTWISE = _names("""
    addcdiv addcmul addr affine_grid_generator binary_cross_entropy_with_logits cudnn_affine_grid_generator
    cudnn_grid_sampler elu_backward gelu_backward glu glu_backward glu_backward_jvp glu_jvp grid_sampler_2d
    grid_sampler_3d _grid_sampler_2d_cpu_fallback hardsigmoid hardsigmoid_backward hardswish hardswish_backward
    linalg_cross log_sigmoid_backward log_sigmoid_forward mish_backward polar _prelu_kernel_backward
    rrelu_with_noise_backward softplus_backward softshrink_backward _standard_gamma_grad _transform_bias_rescale_qkv
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_trilinear3d _native_batch_norm_legit_no_training
    batch_norm_elemt batch_norm_backward_elemt _batch_norm_no_update huber_loss_backward mse_loss_backward
    smooth_l1_loss_backward soft_margin_loss_backward binary_cross_entropy_backward _fused_sgd _fused_adam _fused_adamw
    _fused_adagrad _dirichlet_grad _thnn_fused_gru_cell _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl
    _thnn_fused_gru_cell_backward elu gelu mish softplus softshrink dequantize quantize_per_channel quantize_per_tensor
    fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
""")
"""Besides what PyTorch itself tags as pointwise. Interpolation is here, since every element adds up a fixed few."""

REDUCTIONS = _names("""
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_avg_pool3d_backward
    adaptive_max_pool2d_backward adaptive_max_pool3d_backward affine_grid_generator_backward
    cudnn_affine_grid_generator_backward addbmm addmm addmv _addmm_activation avg_pool1d avg_pool2d avg_pool2d_backward
    avg_pool3d avg_pool3d_backward baddbmm batch_norm_backward batch_norm_backward_reduce batch_norm_gather_stats
    batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats _batch_norm_with_update
    _batch_norm_with_update_functional bmm _cdist_backward _cdist_forward cholesky cholesky_inverse cholesky_solve
    _cholesky_solve_helper col2im _compute_linear_combination conv_depthwise3d _conv_depthwise2d conv_tbc
    conv_tbc_backward convolution _convolution convolution_backward convolution_backward_overrideable
    convolution_overrideable _convolution_double_backward _ctc_loss _ctc_loss_backward ctc_loss _cudnn_ctc_loss
    _cudnn_attention_backward _cudnn_attention_forward cudnn_batch_norm cudnn_batch_norm_backward cudnn_convolution
    cudnn_convolution_add_relu cudnn_convolution_relu cudnn_convolution_transpose cudnn_grid_sampler_backward _cudnn_rnn
    _cudnn_rnn_backward cumprod cumsum dist dot _dyn_quant_matmul_4bit _efficient_attention_backward
    _efficient_attention_forward _embedding_bag _embedding_bag_backward _embedding_bag_dense_backward
    _embedding_bag_forward_only _embedding_bag_per_sample_weights_backward embedding_dense_backward embedding_renorm
    _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _flash_attention_backward _flash_attention_forward
    _flash_attention_forward_no_dropout_inplace _foreach_mm _foreach_norm _foreach_powsum fractional_max_pool2d_backward
    fractional_max_pool3d_backward _fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional
    _fused_rms_norm _fused_rms_norm_backward geqrf grid_sampler_2d_backward grid_sampler_3d_backward
    _grid_sampler_2d_cpu_fallback_backward _grouped_mm histc histogram _histogramdd_bin_edges _histogramdd_from_bin_cts
    _histogramdd_from_bin_tensors hspmm index_add index_reduce _int_mm linalg__powsum linalg_cholesky_ex linalg_eig
    _linalg_det _linalg_eigh _linalg_eigvals linalg_eigvals linalg_householder_product linalg_inv_ex
    linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp
    linalg_pinv linalg_qr _linalg_slogdet _linalg_solve_ex linalg_solve_triangular _linalg_svd linalg_vector_norm linear
    linear_backward log_softmax _log_softmax _log_softmax_backward_data _logcumsumexp logcumsumexp logsumexp
    masked_scatter_backward _masked_softmax _masked_softmax_backward matmul_backward max_pool2d_backward
    max_pool2d_with_indices_backward max_pool3d_with_indices_backward mean _mixed_dtypes_linear mkldnn_convolution
    mkldnn_linear mkldnn_linear_backward mkldnn_linear_backward_input mkldnn_linear_backward_weights mkldnn_rnn_layer
    mkldnn_rnn_layer_backward mm multi_margin_loss multi_margin_loss_backward multilabel_margin_loss_backward
    multilabel_margin_loss_forward mv nansum native_batch_norm native_batch_norm_backward _native_batch_norm_legit
    _native_batch_norm_legit_functional native_group_norm native_group_norm_backward native_layer_norm
    native_layer_norm_backward _native_multi_head_attention native_norm _nnpack_spatial_convolution norm ormqr
    _pdist_backward _pdist_forward prod reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
    renorm replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward _safe_softmax
    scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention
    _scaled_dot_product_cudnn_attention_backward _scaled_dot_product_efficient_attention
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_fused_attention_overrideable
    _scaled_dot_product_fused_attention_overrideable_backward _scaled_grouped_mm _scaled_grouped_mm_v2 _scaled_mm
    _scaled_mm_v2 scatter_add scatter_reduce segment_reduce _segment_reduce_backward _slow_conv2d_backward
    _slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d
    slow_conv_transpose3d softmax _softmax _softmax_backward_data std std_mean sum trace _transformer_encoder_layer_fwd
    triangular_solve _trilinear _triton_multi_head_attention _triton_scaled_dot_attention unfold_backward
    _unsafe_masked_index_put_accumulate upsample_bicubic2d_backward _upsample_bicubic2d_aa
    _upsample_bicubic2d_aa_backward upsample_bilinear2d_backward _upsample_bilinear2d_aa
    _upsample_bilinear2d_aa_backward upsample_linear1d_backward _upsample_lanczos2d_aa _upsample_lanczos2d_aa_backward
    upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
    _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
    upsample_trilinear3d_backward var var_mean vdot _weight_int4pack_mm _weight_int4pack_mm_for_cpu
    _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm _weight_norm_interface _weight_norm_interface_backward
    binary_cross_entropy huber_loss mse_loss nll_loss2d_forward nll_loss_forward smooth_l1_loss soft_margin_loss
""")
"""Products, sums, norms, statistics, convolutions, attention, factorisations, transforms, and scattering that adds."""

LAYOUT = _names("""
    _reshape_alias _reshape_copy _to_copy _unsafe_view alias as_strided clone contiguous copy expand permute reshape
    squeeze t transpose unsqueeze view
""")
"""Views and copies, of which a program makes others where a batch of one is contiguous."""

UNINITIALISED = _names("""
    empty empty_like empty_permuted empty_strided new_empty new_empty_strided resize resize_as _resize_output set
""")
"""Of EXACT: their results hold anything, and are not looked at."""

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")
"""Namespaces of operators in which several processes take part."""

COLLECTIVES_EXACT = _names("""
    all_gather_into_tensor all_gather_into_tensor_coalesced all_gather_into_tensor_out all_to_all_single alltoall_
    alltoall_base_ allgather_ _allgather_base_ allgather_coalesced_ allgather_into_tensor_coalesced_ barrier broadcast
    broadcast_ gather_ monitored_barrier_ recv_ recv_any_source_ scatter_ send wait_tensor
""")
"""Of these: what moves data between processes without adding it up."""

OURS = ("bikernels", "bikernels_eager")
"""Namespaces of this package's own operators, which compute as the mode does."""

_BARE_ALPHA = _names("add sub rsub")
_UNREDUCED_LOSSES = _names("""
    binary_cross_entropy huber_loss mse_loss nll_loss2d_forward nll_loss_forward smooth_l1_loss soft_margin_loss
    binary_cross_entropy_with_logits
""")
_NORMS_OF_BATCHES = _names("""
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional cudnn_batch_norm
""")

_CHOOSING = _names("convolution _convolution convolution_backward")
"""Made of others, but of which ones depends on the batch: looked at as a whole."""

_allowed: set[str] = set()


def allow_operators(*names: str) -> None:
    """Declare operators, by names such as "mylib::attention", to compute every row from that row alone.

    For the rest of the process `audit` then takes them for row-independent, unless it observes otherwise, and
    `set_batch_invariant_mode(strict=True)`, when next entered, lets them through.

    Raises:
        ValueError: a name is not of the form "namespace::operator".
    """
    for name in names:
        namespace, separator, rest = name.partition("::")
        if not (namespace and separator and rest):
            raise ValueError(f"operator {name!r} has no namespace; write it as in 'mylib::attention'")
    _allowed.update(names)


def base_name(name: str) -> str:
    """The name without namespace, overload, and the underscore of an in-place form: aten::add_.Tensor -> add."""
    base = name.partition("::")[2].partition(".")[0]
    return base[:-1] if base.endswith("_") and not base.endswith("__") else base


def bind(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by their names, with the schema's defaults."""
    bound = {}
    for i, argument in enumerate(operator._schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def kind_of(operator: Any) -> Kind:
    """The kind of an operator (`torch._ops.OpOverload`), whatever its arguments."""
    name = operator._name
    namespace, base = name.partition("::")[0], base_name(name)
    if name.partition(".")[0] in _allowed or operator.is_view:
        return Kind.EXACT
    if torch.Tag.nondeterministic_seeded in operator.tags and base not in REDUCTIONS:
        return Kind.RANDOM
    if namespace in OURS:
        return Kind.REDUCES  # covered, see below
    if namespace in ("prim", "profiler"):
        return Kind.EXACT
    if namespace in COLLECTIVES:
        exact = name.partition("::")[2].partition(".")[0] in COLLECTIVES_EXACT
        return Kind.EXACT if exact else Kind.REDUCES
    if namespace == "prims":
        return Kind.REDUCES if base in REDUCTIONS else Kind.POINTWISE
    if namespace != "aten":
        return Kind.UNKNOWN
    if base.startswith("_foreach_") and base not in REDUCTIONS:
        base = base.removeprefix("_foreach_")
        return Kind.EXACT if base in EXACT else Kind.POINTWISE
    if base == "scatter" and "reduce" in name:
        return Kind.REDUCES
    if base in EXACT or base.endswith("_copy"):
        return Kind.EXACT
    if base in REDUCTIONS:
        return Kind.REDUCES
    if base in POINTWISE or torch.Tag.pointwise in operator.tags:
        return Kind.POINTWISE
    return Kind.UNKNOWN


def kind_of_call(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """The kind of a call: arguments switch some reductions off, and integers add up exactly in any order."""
    kind, base = kind_of(operator), base_name(operator._name)
    if kind is Kind.REDUCES or kind is Kind.UNKNOWN:
        if operator._name.startswith("aten::") and not any(True for _ in float_dtypes((args, kwargs))):
            return Kind.EXACT
        if base in _UNREDUCED_LOSSES and bind(operator, args, kwargs)["reduction"] == 0:
            return Kind.POINTWISE
        if base in _NORMS_OF_BATCHES:
            bound = bind(operator, args, kwargs)
            return Kind.POINTWISE if bound.get("training", bound.get("train")) is False else kind
        return kind
    bound = bind(operator, args, kwargs) if kind is Kind.EXACT or base in _UNREDUCED_LOSSES else {}
    if bound.get("accumulate") is True and any(True for _ in float_dtypes((args, kwargs))):
        return Kind.REDUCES
    if base in _BARE_ALPHA and bound.get("alpha", 1) != 1:
        return Kind.POINTWISE
    if base in _UNREDUCED_LOSSES and bound["reduction"] != 0:
        return Kind.REDUCES
    return kind


def is_repeatable(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may be repeated, and gives the same result: no random numbers, and no other process takes part."""
    if torch.Tag.nondeterministic_seeded in operator.tags and (
        kind_of(operator) is Kind.RANDOM or bind(operator, args, kwargs).get("dropout_p", 0) != 0
    ):
        return False
    return operator._name.partition("::")[0] not in COLLECTIVES and base_name(operator._name) not in UNINITIALISED


def float_dtypes(tree: Any) -> Iterator[torch.dtype]:
    """The floating-point and complex dtypes of a call's tensors and `dtype=` arguments, in their order."""
    if isinstance(tree, torch.Tensor):
        tree = tree.dtype
    if isinstance(tree, torch.dtype):
        if tree.is_floating_point or tree.is_complex:
            yield tree
    elif isinstance(tree, dict):
        yield from float_dtypes(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for leaf in tree:
            yield from float_dtypes(leaf)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors among a call's arguments or results, in their order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for leaf in tree:
            yield from tensors(leaf)


def is_replaced(name: str, device_type: str) -> bool:
    """Whether the mode replaces this operator ("aten::mm.out") for tensors of this type of device."""
    if name.partition("::")[0] in OURS:
        return True
    overload = name.removeprefix("aten::")
    return overrides.is_replaced(overload, device_type)


def is_covered(name: str, device_type: str, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether a call with these floating-point dtypes runs on bikernels' kernels in the mode."""
    return (
        device_type in ("cpu", "cuda")
        and is_replaced(name, device_type)
        and all(dtype in core.FLOATS for dtype in dtypes)
    )


def is_composite(operator: Any, device_type: str) -> bool:
    """Whether PyTorch makes the operator of others, which then go through the dispatcher themselves."""
    name = operator._name
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if base_name(name) in _CHOOSING:
        return False
    if has_kernel(name, device_type.upper()) and name.removeprefix("aten::") not in overrides.BELOW_AUTOGRAD:
        return False
    if has_kernel(name, "CompositeImplicitAutograd"):
        return True
    # The explicit ones of other libraries may be kernels of their own in Python; PyTorch's are made of its operators.
    return name.startswith("aten::") and has_kernel(name, "CompositeExplicitAutograd")
