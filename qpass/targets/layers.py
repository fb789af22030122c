"""Which modules stand in for linears and embeddings whose weights are rotated or quantized."""

# N out_features, K in_features, G groups of a row

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self, final

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.formats import QuantSpec, wide
from qpass.ops import (
    BlocksLinear,
    PackedLinear,
    PointsLinear,
    as_integers,
    fake_quantize,
    hadamard,
    integer_rows,
    linear_blocks,
    linear_codes,
    linear_points,
    linear_real,
    quantize_blocks,
    quantize_rows,
)
from qpass.ops.bits import from_bits
from qpass.ops.packing import unpack, untile
from qpass.ops.quantize import has_offsets
from qpass.quantize.containers import Held, as_lines, hold, in_blocks, release
from qpass.rotations import Kronecker, Transform
from qpass.targets import tensors as layouts
from qpass.targets.backward import refusing_backward
from qpass.targets.crossing import gated
from qpass.targets.fixed import Fixed, Quantized
from qpass.targets.numbers import NUMBERS, numbers_of
from qpass.targets.tensors import LINES, Shapes, from_tensors, shapes, to_tensors

# kinds of devices: what multiplies 4-bit floats as they are, and what reads them as integers
GPU, HOST = "cuda", "cpu"


@final
class OnlineTransform(Fixed):
    """`x -> x R` on the last axis, by the fast form of R; the inverse lacks its signs."""

    signs: Tensor
    factor: Tensor

    def __init__(
        self, transform: Transform | Kronecker, dtype: torch.dtype, *, inverse: bool = False
    ) -> None:
        super().__init__()
        computed = wide(dtype)
        fast = transform.fast()
        if fast is None:
            raise BadInput(f"{transform} has no fast form, so it cannot run with the model")
        self.transform = transform
        self.power = fast.power
        # R = diag(signs) (factor (x) H) and H is symmetric
        signs = torch.ones_like(fast.signs) if inverse else fast.signs
        factor = fast.factor.mT.contiguous() if inverse else fast.factor
        self.register_buffer("signs", signs.to(computed, copy=True), persistent=False)
        self.register_buffer("factor", factor.to(computed, copy=True), persistent=False)

    def undo(self, weight_nk: Tensor) -> Tensor:
        """`weight @ R.T`: what a weight that absorbed the transform was before."""
        ones = torch.ones_like(self.signs)
        turned = hadamard(weight_nk, ones, self.factor.mT.contiguous(), self.power)
        return turned * self.signs.to(turned.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, self.signs, self.factor, self.power)

    def extra_repr(self) -> str:
        return f"{self.transform.rotation}, {self.transform.width}"


@final
class QuantizedLinear(Quantized):
    """`x @ W.T + bias` with a quantized W, after an optional transform of `x`.

    With `activation_bits` the (transformed) rows of `x` become integers too, with `activation` they
    become what that spec says: integers of another kind, or floats, which are multiplied by a
    reference path without kernels. So are weights that are no integers of 4 or 8 bits: `spec` says
    what the codes mean, by default integers that count as they are packed. Where both are 4-bit
    floats in blocks, a GPU holds and multiplies them as such. `transposed` records that the layer
    it stands in for stores `[in, out]`.
    """

    packed_weight: Tensor
    points: Tensor | None
    row_scales: Tensor
    group_scales: Tensor | None
    group_offsets: Tensor | None
    bias: Tensor | None
    sums: Tensor | None
    row_by_row = True

    def __init__(
        self,
        packed: Held,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        activation_bits: int | None = None,
        activation: QuantSpec | None = None,
        transform: Transform | Kronecker | None = None,
        transposed: bool = False,
        spec: QuantSpec | None = None,
    ) -> None:
        super().__init__(dtype)
        if transform is not None and transform.width != packed.in_features:
            raise BadInput(f"{transform} meets an input of width {packed.in_features}")
        if activation is not None and activation_bits is not None:
            raise BadInput("activation: given beside activation_bits; pass one of them")
        if activation_bits is not None and isinstance(packed, PointsLinear):
            raise BadInput("activation_bits: this weight is no integers; pass activation, a spec")
        self.online = None if transform is None else OnlineTransform(transform, dtype)
        self.bits = packed.bits if isinstance(packed, PackedLinear) else 8
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.activation_bits = activation_bits
        self.activation = activation
        self.transposed = transposed
        if spec is None:
            if isinstance(packed, BlocksLinear):
                raise BadInput("spec: missing for 4-bit floats in blocks; pass that of the weight")
            scales, offsets = packed.group_scales, packed.group_offsets is not None
            groups = 0 if scales is None else scales.shape[1]
            spec = integers(self.bits, groups, packed.in_features, offsets=offsets)
        self.spec = spec
        self._hold(packed, bias)

    def _hold(self, packed: Held, bias: Tensor | None) -> None:
        if self._elsewhere(packed):
            blocks = not isinstance(packed, BlocksLinear)
            packed = hold(release(packed, self.spec), blocks=blocks)
        if bias is not None:
            # as exact as the sums it is added to, whatever the dtype of the module
            bias = bias.detach().to(wide(bias.dtype), copy=True)
        if isinstance(packed, BlocksLinear):
            scales, offsets = packed.scales, None
        else:
            scales, offsets = packed.group_scales, packed.group_offsets
        buffers = {
            "packed_weight": packed.weight,
            "points": packed.points if isinstance(packed, PointsLinear) else None,
            "row_scales": packed.row_scales,
            "group_scales": scales,
            "group_offsets": offsets,
            "bias": bias,
        }
        # torch.export counts absent buffers as if they were there: they come last
        for name, tensor in sorted(buffers.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, tensor, persistent=False)
        rows, sums = self.integer_rows, None
        if rows is not None and has_offsets(rows):
            # what an offset of the input adds to the outputs
            sums = self._numbers(torch.float64).sum(1).float()
        self.register_buffer("sums", sums, persistent=False)

    @property
    def integer_rows(self) -> QuantSpec | None:
        """What the rows of the input are as integers, where `activation` makes such."""
        rows = self.activation
        return rows if rows and self.points is None and integer_rows(rows) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._elsewhere(self.packed):
            self._hold(self.packed, self.bias)
        return self

    def _elsewhere(self, packed: Held) -> bool:
        """Whether a weight of 4-bit floats is in the form for the other kind of device."""
        if not in_blocks(self.spec, self.activation):
            return False
        kind = packed.weight.device.type
        return kind == (HOST if isinstance(packed, BlocksLinear) else GPU)

    @property
    def packed(self) -> Held:
        """The weight as the operators take it."""
        if self.group_scales is not None and self.group_scales.dtype is torch.uint8:
            return BlocksLinear(
                self.packed_weight, self.group_scales, self.row_scales, self.spec.scale_format
            )
        if self.points is not None:
            return PointsLinear(
                self.packed_weight,
                self.points,
                self.row_scales,
                self.group_scales,
                self.group_offsets,
            )
        return PackedLinear(
            self.packed_weight,
            self.row_scales,
            self.group_scales,
            self.group_offsets,
            self.bits,
            self.in_features,
            self.out_features,
        )

    @property
    def groups(self) -> int:
        return 1 if self.group_scales is None else self.group_scales.shape[1]

    @property
    def signed(self) -> bool:
        """Whether codes count from below zero; 4-bit codes with offsets count from zero."""
        return self.bits == 8 or self.group_offsets is None

    @property
    def codes(self) -> Tensor:
        """The codes `[N, K]` in their container, one to a byte."""
        if self.points is not None:
            return self.packed_weight
        if isinstance(self.packed, BlocksLinear):
            return from_bits(self.packed_weight, 4, self.in_features, torch.uint8)
        shape = (self.out_features, self.in_features)
        return unpack(self.packed_weight, self.bits, shape, self.groups, signed=self.signed)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight as numbers, for an input that was not transformed.

        `[N, K]`, or `[K, N]` where the layer stands in for one that stores it so.
        """
        values = self._numbers(wide(self.dtype))
        if self.online is not None:
            values = self.online.undo(values)
        values = values.to(self.dtype)
        return values.mT if self.transposed else values

    def _numbers(self, computed: torch.dtype) -> Tensor:
        held, n = self.packed, self.out_features
        if isinstance(held, PointsLinear | BlocksLinear):
            return held.dequantize(computed)
        values = self.codes.to(computed).reshape(n, self.groups, -1)
        if self.group_scales is not None:
            values = values * untile(self.group_scales, n).to(computed).unsqueeze(2)
        if self.group_offsets is not None:
            values = values + untile(self.group_offsets, n).to(computed).unsqueeze(2)
        return values.reshape(n, self.in_features) * self.row_scales.to(computed).unsqueeze(1)

    @gated
    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return refusing_backward(self._product(x.detach()))
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        online, held = self.online, self.packed
        signs, factor, power = None, None, 1
        if online is not None:
            signs, factor, power = online.signs, online.factor, online.power
        if self.activation_bits is not None:
            assert isinstance(held, PackedLinear)
            codes, scales = quantize_rows(x, self.activation_bits, signs, factor, power)
            return linear_codes(codes, scales, held, self.bias, x.dtype)
        if isinstance(held, BlocksLinear):
            kind = (held.block, held.scale_format)
            parts = quantize_blocks(x, *kind, signs, factor, power)
            return linear_blocks(*parts, held, self.bias, x.dtype)
        if (rows := self.integer_rows) is not None:
            assert isinstance(held, PackedLinear)
            codes, scales, offsets = as_integers(x, rows, signs, factor, power)
            if offsets is None:
                return linear_codes(codes, scales, held, self.bias, x.dtype)
            y = linear_codes(codes, scales, held, self.bias, wide(x.dtype))
            assert self.sums is not None
            return (y + offsets * self.sums).to(x.dtype)
        if self.activation is not None:
            # in the type in which the product sums them
            y = fake_quantize(x, self.activation, signs, factor, power)
        else:
            y = x if online is None else online(x)
        if isinstance(held, PointsLinear):
            return linear_points(y, held, self.bias).to(x.dtype)
        return linear_real(y, held, self.bias).to(x.dtype)

    def canonical(self) -> dict[str, Tensor]:
        return {**to_tensors(release(self.packed, self.spec)), **self._beside()}

    def expected(self) -> Shapes:
        return self._with_others(shapes(self.spec, self.out_features, self.in_features))

    def stored(self) -> dict[str, Tensor]:
        if not as_lines(self.spec):
            return self.canonical()
        held = self.packed
        assert isinstance(held, PackedLinear)
        return {**layouts.to_lines(held), **self._beside()}

    def stored_shapes(self) -> Shapes:
        if not as_lines(self.spec):
            return self.expected()
        return self._with_others(
            layouts.line_shapes(self.spec, self.out_features, self.in_features)
        )

    def _beside(self) -> dict[str, Tensor]:
        """What a checkpoint has beside the weight."""
        transform = self._numbered
        found = {} if transform is None else {NUMBERS: transform.given()}
        return found if self.bias is None else {**found, "bias": self.bias}

    def _with_others(self, weight: Shapes) -> Shapes:
        found, n = {**weight, **numbers_of(self._numbered)}, self.out_features
        return found if self.bias is None else {**found, "bias": ((n,), self.bias.dtype)}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        if (transform := self._numbered) is not None:
            # those of another transform are refused
            transform.filled(tensors[NUMBERS])
        n, k = self.out_features, self.in_features
        if LINES in tensors:
            copied = {name: tensor.clone() for name, tensor in tensors.items()}
            held: Held = layouts.from_lines(self.spec, n, k, copied)
        else:
            held = hold(from_tensors(self.spec, k, tensors))
        self._hold(held, tensors.get("bias"))

    @property
    def _numbered(self) -> Kronecker | None:
        """The transform in front, if it goes by numbers that a checkpoint has to have."""
        transform = None if self.online is None else self.online.transform
        return transform if isinstance(transform, Kronecker) else None

    def extra_repr(self) -> str:
        if (rows := self.activation) is not None:
            activation = rows.format + (", static" if rows.static else "")
        else:
            activation = "float" if self.activation_bits is None else f"int{self.activation_bits}"
        return (
            f"{self.in_features}, {self.out_features}, format={self.spec.format}, "
            f"groups={self.groups}, activation={activation}, bias={self.bias is not None}"
        )


def integers(bits: int, groups: int, width: int, *, offsets: bool) -> QuantSpec:
    """The spec of rows of integers of 4 or 8 bits with scales as kernels read them."""
    return QuantSpec(
        f"int{bits}",
        width // groups if groups > 1 else "channel",
        scale_format="float16" if groups else "float32",
        symmetric=not offsets,
    )


@final
class RotatedLinear(nn.Module):
    """`(x R) @ rotated.T + bias`: a float linear whose weight has absorbed a transform."""

    row_by_row = True

    def __init__(
        self,
        rotated_nk: Tensor,
        bias: Tensor | None = None,
        *,
        transform: Transform,
        transposed: bool = False,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rotated_nk.shape
        if transform.width != self.in_features:
            raise BadInput(f"{transform} meets an input of width {self.in_features}")
        self.online = OnlineTransform(transform, rotated_nk.dtype)
        self.transposed = transposed
        self.rotated = nn.Parameter(rotated_nk.detach().clone(), requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight for an input that was not transformed."""
        values = self.online.undo(self.rotated.detach())
        return values.mT if self.transposed else values

    @gated
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.online(x), self.rotated, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
