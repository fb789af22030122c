"""Which modules stand in for linears and embeddings whose weights are rotated or quantized."""

# N out_features, K in_features, G groups of a row

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.ops import (
    PackedLinear,
    embedding,
    from_nibbles,
    hadamard,
    linear_codes,
    linear_real,
    pack_linear,
    quantize_rows,
    to_nibbles,
)
from qpass.ops.packing import unpack, untile
from qpass.rotations import Transform
from qpass.runtime import native
from qpass.targets.backward import refusing_backward
from qpass.targets.crossing import gated


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that a layer of `dtype` computes in before it rounds."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Fixed(nn.Module):
    """A module of qpass's operators, whose buffers keep their types when it is cast."""

    def __init__(self) -> None:
        super().__init__()
        # the operators run on plain PyTorch until somebody loads the kernels
        native.load()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


@final
class OnlineTransform(Fixed):
    """`x -> x R` on the last axis, by the fast form of R; the inverse lacks its signs."""

    signs: Tensor
    factor: Tensor

    def __init__(self, transform: Transform, dtype: torch.dtype, *, inverse: bool = False) -> None:
        super().__init__()
        wide = _wide(dtype)
        fast = transform.fast()
        if fast is None:
            raise BadInput(f"{transform} has no fast form, so it cannot run with the model")
        self.transform = transform
        self.power = fast.power
        # R = diag(signs) (factor (x) H) and H is symmetric
        signs = torch.ones_like(fast.signs) if inverse else fast.signs
        factor = fast.factor.mT.contiguous() if inverse else fast.factor
        self.register_buffer("signs", signs.to(wide, copy=True), persistent=False)
        self.register_buffer("factor", factor.to(wide, copy=True), persistent=False)

    def undo(self, weight_nk: Tensor) -> Tensor:
        """`weight @ R.T`: what a weight that absorbed the transform was before."""
        ones = torch.ones_like(self.signs)
        turned = hadamard(weight_nk, ones, self.factor.mT.contiguous(), self.power)
        return turned * self.signs.to(turned.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x, self.signs, self.factor, self.power)

    def extra_repr(self) -> str:
        return f"{self.transform.rotation}, {self.transform.width}"


class _Quantized(Fixed, abc.ABC):
    """Integers and scales: packed in memory, in the form of checkpoints in the state dict."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise BadInput(f"a layer computes in a floating type, not {dtype}")
        self.dtype = dtype

    @abc.abstractmethod
    def canonical(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""

    @abc.abstractmethod
    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and type of each canonical tensor."""

    @abc.abstractmethod
    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy canonical tensors of the expected shapes and types."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # what a cast does change is the type that the layer computes in
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = {prefix + name: found for name, found in self.expected().items()}
        missing = [key for key in expected if key not in state_dict]
        missing_keys += missing
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in expected]
        wrong: list[str] = []
        for key, (shape, dtype) in expected.items():
            given = state_dict.get(key)
            if given is not None and (tuple(given.shape), given.dtype) != (shape, dtype):
                found = f"{given.dtype} {tuple(given.shape)}"
                wrong.append(f"{key} is {found}, expected {dtype} {shape}")
        error_msgs += wrong
        if not missing and not wrong:
            self.adopt({key.removeprefix(prefix): state_dict[key] for key in expected})


@final
class QuantizedLinear(_Quantized):
    """`x @ W.T + bias` with a quantized W, after an optional transform of `x`.

    With `activation_bits` the (transformed) rows of `x` become integers too. `transposed` records
    that the layer it stands in for stores `[in, out]`.
    """

    packed_weight: Tensor
    row_scales: Tensor
    group_scales: Tensor | None
    group_offsets: Tensor | None
    bias: Tensor | None
    row_by_row = True

    def __init__(
        self,
        packed: PackedLinear,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        activation_bits: int | None = None,
        transform: Transform | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(dtype)
        if transform is not None and transform.width != packed.in_features:
            raise BadInput(f"{transform} meets an input of width {packed.in_features}")
        self.online = None if transform is None else OnlineTransform(transform, dtype)
        self.bits = packed.bits
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.activation_bits = activation_bits
        self.transposed = transposed
        self._hold(packed, bias)

    def _hold(self, packed: PackedLinear, bias: Tensor | None) -> None:
        if bias is not None:
            # as exact as the sums it is added to, whatever the dtype of the module
            bias = bias.detach().to(_wide(bias.dtype), copy=True)
        self.register_buffer("packed_weight", packed.weight, persistent=False)
        self.register_buffer("row_scales", packed.row_scales, persistent=False)
        self.register_buffer("group_scales", packed.group_scales, persistent=False)
        self.register_buffer("group_offsets", packed.group_offsets, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def packed(self) -> PackedLinear:
        """The weight as the operators take it."""
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
        """The codes `[N, K]`, one to a byte."""
        shape = (self.out_features, self.in_features)
        return unpack(self.packed_weight, self.bits, shape, self.groups, signed=self.signed)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight as numbers, for an input that was not transformed.

        `[N, K]`, or `[K, N]` where the layer stands in for one that stores it so.
        """
        n, wide = self.out_features, _wide(self.dtype)
        values = self.codes.to(wide).reshape(n, self.groups, -1)
        if self.group_scales is not None:
            values = values * untile(self.group_scales, n).to(wide).unsqueeze(2)
        if self.group_offsets is not None:
            values = values + untile(self.group_offsets, n).to(wide).unsqueeze(2)
        values = values.reshape(n, self.in_features) * self.row_scales.to(wide).unsqueeze(1)
        if self.online is not None:
            values = self.online.undo(values)
        values = values.to(self.dtype)
        return values.mT if self.transposed else values

    @gated
    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return refusing_backward(self._product(x.detach()))
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        online = self.online
        if self.activation_bits is None:
            return linear_real(x if online is None else online(x), self.packed, self.bias)
        if online is None:
            codes, scales = quantize_rows(x, self.activation_bits)
        else:
            codes, scales = quantize_rows(
                x, self.activation_bits, online.signs, online.factor, online.power
            )
        return linear_codes(codes, scales, self.packed, self.bias, x.dtype)

    def canonical(self) -> dict[str, Tensor]:
        n = self.out_features
        codes = self.codes
        found = {
            "codes": to_nibbles(codes) if self.bits == 4 else codes,
            "row_scales": self.row_scales,
        }
        if self.group_scales is not None:
            found["group_scales"] = untile(self.group_scales, n)
        if self.group_offsets is not None:
            found["group_offsets"] = untile(self.group_offsets, n)
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = self.out_features, self.in_features
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((n, -(-k // 2)), torch.uint8) if self.bits == 4 else ((n, k), torch.int8),
            "row_scales": ((n,), torch.float32),
        }
        if self.group_scales is not None:
            found["group_scales"] = ((n, self.groups), torch.float16)
        if self.group_offsets is not None:
            found["group_offsets"] = ((n, self.groups), torch.float16)
        if self.bias is not None:
            found["bias"] = ((n,), self.bias.dtype)
        return found

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        codes = tensors["codes"]
        if self.bits == 4:
            codes = from_nibbles(codes, self.in_features, signed=self.signed)
        packed = pack_linear(
            codes,
            tensors["row_scales"].clone(),
            tensors.get("group_scales"),
            tensors.get("group_offsets"),
            bits=self.bits,
        )
        bias = tensors.get("bias")
        self._hold(packed, bias)

    def extra_repr(self) -> str:
        activation = "float" if self.activation_bits is None else f"int{self.activation_bits}"
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.groups}, "
            f"activation={activation}, bias={self.bias is not None}"
        )


@final
class QuantizedEmbedding(_Quantized):
    """Rows `codes[i] * scales[i]` of a table of int8 codes `[V, D]`."""

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim = codes.shape
        # the row of a padding index is a row like any other; only its gradient would differ
        self.padding_idx = padding_idx
        self.adopt({"codes": codes, "row_scales": scales})

    @property
    def weight(self) -> Tensor:
        """A copy of the table as numbers, `[V, D]`."""
        return (self.codes.float() * self.scales.unsqueeze(1)).to(self.dtype)

    @gated
    def forward(self, indices: Tensor) -> Tensor:
        return embedding(indices, self.codes, self.scales, self.dtype)

    def canonical(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "row_scales": self.scales}

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        v, d = self.num_embeddings, self.embedding_dim
        return {"codes": ((v, d), torch.int8), "row_scales": ((v,), torch.float32)}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        self.register_buffer("codes", tensors["codes"].clone(), persistent=False)
        self.register_buffer("scales", tensors["row_scales"].clone(), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


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
