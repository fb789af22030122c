"""Rounded weights until they are put in place, at their true bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.ops.bits import from_bits, to_bits


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A quantized tensor whose codes take their true bits, `width` to a row."""

    spec: QuantSpec
    packed: Tensor
    width: int
    scales: tuple[Tensor, Tensor | None, Tensor | None]

    @staticmethod
    def of(tensor: QuantizedTensor) -> _Packed:
        codes_nk = tensor.codes_nk
        scales = tensor.row_scales_n, tensor.group_scales_ng, tensor.group_offsets_ng
        packed = to_bits(codes_nk, tensor.spec.codes.bits)
        return _Packed(tensor.spec, packed, codes_nk.shape[1], scales)

    def tensor(self) -> QuantizedTensor:
        codes = self.spec.codes
        codes_nk = from_bits(self.packed, codes.bits, self.width, codes.code_dtype)
        return QuantizedTensor(self.spec, codes_nk, *self.scales)


@final
class Codes:
    """Quantized weights by site, which together take no more memory than the quantized model."""

    def __init__(self) -> None:
        self._held: dict[str, _Packed] = {}

    def __contains__(self, site: str) -> bool:
        return site in self._held

    def put(self, site: str, tensor: QuantizedTensor) -> None:
        """Keep a site's weight."""
        self._held[site] = _Packed.of(tensor)

    def get(self, site: str) -> QuantizedTensor | None:
        """A site's weight, if there is one."""
        found = self._held.get(site)
        return None if found is None else found.tensor()

    def take(self, site: str) -> QuantizedTensor | None:
        """The same, which is not kept any longer."""
        found = self._held.pop(site, None)
        return None if found is None else found.tensor()
