"""Operations of the dispatcher, by what they do to a value."""

from __future__ import annotations

# read an argument's shape, dtype or device and none of its numbers
SHAPE_ONLY = frozenset(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full new_empty_strided size sym_size stride sym_stride numel sym_numel
    dim storage_offset sym_storage_offset device layout is_contiguous sym_is_contiguous
    is_strides_like_format is_non_overlapping_and_dense""".split()
)
# linear maps with a weight
LAYERS = frozenset("linear addmm convolution _convolution _trilinear multi_head_attention_forward".split())
NORMS = frozenset(
    """batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm instance_norm native_layer_norm
    native_group_norm rms_norm _fused_rms_norm training normalize""".split()
)
NONLINEAR = frozenset(
    """relu leaky_relu silu hardswish sigmoid tanh gelu elu glu hardtanh hardsigmoid hardshrink softshrink
    log_sigmoid_forward mish _prelu_kernel rrelu rrelu_with_noise softplus threshold clamp clamp_min sin""".split()
)
# what a value passes through without becoming something other than pre-activations
THROUGH = frozenset(
    """add sub mul div neg cat stack constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d view _unsafe_view transpose permute t squeeze unsqueeze select slice split
    split_with_sizes unbind expand roll clone detach alias _to_copy native_dropout
    upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d
    mean sum pixel_shuffle pixel_unshuffle""".split()
)
