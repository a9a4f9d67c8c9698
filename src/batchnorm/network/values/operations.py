"""Operations by what they do to a value: to its shape alone, to how its memory is seen."""

from __future__ import annotations

# reads an argument's shape, dtype or device and none of its numbers
SHAPE_ONLY = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "is_cuda",
        "requires_grad",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "type",
        "is_contiguous",
        "is_floating_point",
        "element_size",
        "get_device",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "__len__",
        "len",
        "sym_size",
    ]
)


# of these only the first argument's numbers are read
SHAPE_OF_SECOND = frozenset(["reshape_as", "view_as", "expand_as", "type_as", "resize_as"])


# may return a tensor that shares its storage with the first argument
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "reshape_as",
        "view_as",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "getitem",
        "__getitem__",
        "select",
        "slice",
        "narrow",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "tensor_split",
        "expand",
        "expand_as",
        "contiguous",
        "to",
        "_to_copy",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "type_as",
        "swapaxes",
        "movedim",
        "moveaxis",
        "t",
        "T",
        "mT",
        "detach",
        "alias",
        "as_strided",
        "unfold",
        "diagonal",
        "real",
        "view_as_real",
        "identity",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
    ]
)
