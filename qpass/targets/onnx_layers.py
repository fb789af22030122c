"""Which modules stand in for quantized layers while a model is exported to ONNX."""

# N out_features, K in_features, G groups of a row

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from qpass.errors import Unsupported
from qpass.formats import Integers, QuantizedTensor, QuantSpec
from qpass.ir import Note
from qpass.quantize.containers import container_bits, release
from qpass.rotations.hadamard_orders import sylvester
from qpass.targets.layers import OnlineTransform, QuantizedLinear, RotatedLinear
from qpass.targets.tables import QuantizedEmbedding

OPSET = 21  # the first with 4-bit integers and DequantizeLinear by blocks
# buffers of this name hold int8 numbers that the file stores in 4 bits
NIBBLES = "int4_codes"
BYTES = "int8_codes"
# those that it stores as 8-bit floats
FLOATS = "float8_codes"
# blocks for which ONNX Runtime has products with integer weights: these powers of two
FUSED_BLOCKS = (256, 128, 64, 32, 16)
# larger Hadamard matrices run as two Kronecker factors: n (a + b) products instead of n a b
LARGEST_FACTOR = 128


@contextmanager
def standing_in(model: nn.Module) -> Generator[tuple[nn.Module, tuple[Note, ...]]]:
    """`model` with every layer of qpass replaced by one that the exporter can read.

    The model is as it was afterwards.
    """
    holder = nn.ModuleList([model])
    made: dict[nn.Module, nn.Module] = {}
    notes: list[Note] = []
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, parent in list(holder.named_modules()):
            for name, child in list(parent.named_children()):
                where = f"{path}.{name}".removeprefix("0.")
                if child not in made:
                    found = _stand_in(child, where, notes)
                    if found is None:
                        continue
                    made[child] = found
                swapped.append((parent, name, child))
                parent._modules[name] = made[child]
        yield holder[0], tuple(notes)
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def _stand_in(layer: nn.Module, where: str, notes: list[Note]) -> nn.Module | None:
    if isinstance(layer, QuantizedLinear):
        found = _Linear(layer)
        notes += [Note(False, where, why) for why in found.reasons]
        return found
    if isinstance(layer, QuantizedEmbedding):
        return _Embedding(layer)
    if isinstance(layer, RotatedLinear):
        return _Rotated(layer)
    return _Online(layer) if isinstance(layer, OnlineTransform) else None


def fused_block(width: int) -> int | None:
    """The largest block that ONNX Runtime multiplies by and that tiles one of `width` columns."""
    return next((block for block in FUSED_BLOCKS if width % block == 0), None)


def exported_rows(layer: QuantizedLinear) -> QuantSpec | None:
    """What the input of a layer is quantized to in the file; None where it stays float there."""
    rows = layer.activation
    whole = rows is not None and rows.static and rows.integers and rows.codes.bits == 8
    return rows if whole else None


def _why_float(layer: QuantizedLinear) -> str:
    rows, why = layer.activation, "have no scales that follow the rows"
    if rows is not None and rows.static:
        why = "of opset 21 have no such codes"
    kind = f"{layer.activation_bits} bits" if rows is None else rows.format
    return f"activations of {kind} stay float: quantize and dequantize nodes {why}"


@final
class _Online(nn.Module):
    """`x R` as signs and products with the Kronecker factors of R."""

    signs: Tensor
    factor: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, online: OnlineTransform) -> None:
        super().__init__()
        wide = torch.float32
        # a tuple, so that its own tensors stay out of the export
        self._online = (online,)
        second = min(online.power, LARGEST_FACTOR)
        self.register_buffer("signs", online.signs.to(wide))
        self.register_buffer("factor", online.factor.mT.to(wide).contiguous())
        self.register_buffer("first", _sylvester(online.power // second).to(self.signs))
        self.register_buffer("second", _sylvester(second).to(self.signs))

    def forward(self, x: Tensor) -> Tensor:
        m, a, b = len(self.factor), len(self.first), len(self.second)
        n = x.shape[-1]
        y = (x.to(torch.float32) * self.signs).reshape(*x.shape[:-1], n // (m * a * b), m, a, b)
        if b > 1:
            y = torch.matmul(y, self.second)
        if a > 1:
            y = torch.matmul(self.first, y)
        if m > 1:
            y = torch.matmul(self.factor, y.reshape(*x.shape[:-1], n // (m * a * b), m, a * b))
        return y.reshape(x.shape).to(x.dtype)

    def undo(self, weight_nk: Tensor) -> Tensor:
        """As the transform itself: code around a layer may read its weight."""
        return self._online[0].undo(weight_nk)


def _sylvester(order: int) -> Tensor:
    return sylvester(order).double() * order**-0.5


class _Weighted(nn.Module):
    """A stand-in whose owner may read the weight of the layer it stands for."""

    def __init__(self, layer: QuantizedLinear | QuantizedEmbedding) -> None:
        super().__init__()
        # a tuple, so that the layer's own tensors stay out of the export
        self._layer = (layer,)

    @property
    def weight(self) -> Tensor:
        return self._layer[0].weight


@final
class _Linear(_Weighted):
    """`x @ DequantizeLinear(codes [K, N], scales) + bias` in float32.

    Offsets multiply the sums of `x` over each group: the codes stay symmetric, which is what
    fuses.
    """

    scales: Tensor
    offsets: Tensor | None
    bias: Tensor | None
    x_scale: Tensor
    x_zero: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.online = None if layer.online is None else _Online(layer.online)
        self.shape = (layer.in_features, layer.out_features)
        self.groups = layer.groups
        self.reasons: list[str] = []
        weight = release(layer.packed, layer.spec)
        rows_n1 = weight.row_scales_n.unsqueeze(1)
        scales_ng, offsets_ng = rows_n1, None
        if weight.group_scales_ng is not None:
            scales_ng = rows_n1 * weight.group_scales_ng.float()
        if weight.group_offsets_ng is not None:
            offsets_ng = rows_n1 * weight.group_offsets_ng.float()
        self.codes, codes, unit, zero = _stored(weight, self.reasons)
        if offsets_ng is not None:
            offsets_ng = offsets_ng + zero * scales_ng
        scales_ng = scales_ng * unit
        self.block = self._block(layer)
        if self.block:
            scales_gn = scales_ng.repeat_interleave(
                layer.in_features // self.groups // self.block, dim=1
            ).mT.contiguous()
        else:
            scales_gn = scales_ng.flatten()
        self.register_buffer(self.codes, codes.mT.contiguous())
        self.register_buffer("scales", scales_gn)
        self.register_buffer("offsets", None if offsets_ng is None else offsets_ng.mT.contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())
        self.rows = exported_rows(layer)
        if self.rows is not None:
            assert self.rows.scale is not None
            # from zero on: the products of ONNX Runtime on x86 take no signed activations
            raised = self.rows.zero - self.rows.whole_range[0]
            zero = torch.tensor(raised, dtype=torch.uint8, device="cpu")
            self.register_buffer("x_scale", torch.tensor(self.rows.scale, device="cpu"))
            self.register_buffer("x_zero", zero)
        elif layer.activation is not None or layer.activation_bits is not None:
            self.reasons.append(_why_float(layer))

    def _block(self, layer: QuantizedLinear) -> int:
        """How many columns share a scale in the file; 0 for all of them."""
        if layer.groups == 1:
            return 0
        width = layer.in_features // layer.groups
        if (found := fused_block(width)) is None:
            self.reasons.append(
                f"blocks of {width} do not fuse in ONNX Runtime: no power of two from "
                f"{FUSED_BLOCKS[-1]} divides them; the weight is decoded at each call"
            )
            return width
        return found

    def _read(self, x: Tensor) -> Tensor:
        """`x` as static codes that are dequantized at once, where the layer reads such."""
        if self.rows is None:
            return x
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (x, self.x_scale, self.x_zero),
            dtype=torch.uint8,
            shape=x.shape,
            version=OPSET,
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (codes, self.x_scale, self.x_zero),
            dtype=torch.float32,
            shape=x.shape,
            version=OPSET,
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        if self.online is not None:
            wide = self.online(wide)
        attributes: dict[str, Any] = {"axis": 1}
        if self.block:
            attributes = {"axis": 0, "block_size": self.block}
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.get_buffer(self.codes), self.scales),
            attributes,
            dtype=torch.float32,
            shape=self.shape,
            version=OPSET,
        )
        y = torch.matmul(self._read(wide), weight)
        if self.offsets is not None:
            sums = wide.reshape(*x.shape[:-1], self.groups, -1).sum(-1)
            y = y + torch.matmul(sums, self.offsets)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


def _stored(weight: QuantizedTensor, reasons: list[str]) -> tuple[str, Tensor, float, int]:
    """The name that says how the file stores codes, these, what they count in, and which was 0."""
    points = weight.spec.codes
    if isinstance(points, Integers):
        zero = 2 ** (points.bits - 1) if points.first == 0 else 0
        if points.bits not in (4, 8):
            reasons.append(f"codes of {points.bits} bits are stored in 4: there is no such type")
        codes = (weight.codes_nk.to(torch.int16) - zero).to(torch.int8)
        return (NIBBLES if points.bits <= 4 else BYTES), codes, 1.0, zero
    unit = points.magnitudes[-1]
    if container_bits(QuantSpec(points.name)) is not None:
        reasons.append(f"{points.name} codes are stored as int8: ONNX Runtime has no such type")
        return BYTES, (points.decode(weight.codes_nk) / unit).to(torch.int8), unit, 0
    if points.name != "e4m3":
        raise Unsupported(f"ONNX has no type for {points.name} codes; keep these layers float")
    return FLOATS, weight.codes_nk.view(torch.float8_e4m3fn), 1.0, 0


@final
class _Embedding(_Weighted):
    """Rows of int8 codes and their scales, gathered apart and multiplied."""

    int8_codes: Tensor
    scales: Tensor

    def __init__(self, layer: QuantizedEmbedding) -> None:
        super().__init__(layer)
        self.dtype = layer.dtype
        self.register_buffer(BYTES, layer.codes)
        self.register_buffer("scales", layer.scales.unsqueeze(1))

    def forward(self, indices: Tensor) -> Tensor:
        codes = nn.functional.embedding(indices, self.int8_codes)
        scales = nn.functional.embedding(indices, self.scales)
        return (codes.to(torch.float32) * scales).to(self.dtype)


@final
class _Rotated(nn.Module):
    """A float linear after an online transform."""

    def __init__(self, layer: RotatedLinear) -> None:
        super().__init__()
        self.online = _Online(layer.online)
        self.weight, self.bias = layer.rotated, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.online(x), self.weight, self.bias)
