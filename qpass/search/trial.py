"""How far a program is from the float one when its products are quantized, under any turning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from qpass.analyze import Matmul, find_matmuls
from qpass.calibrate.outputs import Outputs
from qpass.formats import QuantSpec
from qpass.ir import Program, Step, Weight, edit, fresh, read
from qpass.ops import as_read
from qpass.plan import Plan, Quantized
from qpass.rounding import ROUNDINGS, without_data
from qpass.search.fake import best_clip, fake
from qpass.search.regions import Turning
from qpass.search.scaling import Scaling

# rows of a weight that say where its grid ends
CLIPPED = 128
# of the nearest codes' errors, about what a rounding that knows the data leaves in the outputs
LEFT = 0.3

Inputs = tuple[object, ...]


@final
class Trial:
    """A rewritten program with quantized inputs of products, and what its weights are made from.

    Weights are evaluated once, in float32; a trial turns them further, scales them and quantizes
    them. Where it also scales, the logarithms follow the matrices in its arguments.
    """

    def __init__(
        self, after: Program, plan: Plan, turning: Turning, scaling: Scaling | None = None
    ) -> None:
        entries = {entry.site: entry for entry in plan.quantized}
        self.program = after.clone()
        self.turning, self.scaling = turning, scaling
        scaled = {} if scaling is None else scaling.behind
        self.entries: dict[str, Quantized] = {}
        self.reads: dict[str, int] = {}
        matmuls = find_matmuls(self.program)
        made: dict[tuple[str, QuantSpec], fx.Node] = {}
        for matmul in matmuls:
            entry = entries.get(self.program.site(matmul.use))
            if entry is None:
                continue
            self.entries[matmul.use] = entry
            self.reads[matmul.use] = matmul.reads
            if entry.activation is not None:
                _quantize_input(self.program, matmul, entry.activation, made)
        self.compared = Outputs(after)
        self.base = {
            use: _without(weight, scaled.get(use, ())).evaluate(after.sources)
            for use, weight in after.weights.items()
            if use in self.entries or use in turning.spots or use in scaled
        }
        for use, value in self.base.items():
            dtype = read.dtype(after.node(use))
            self.base[use] = value.to(torch.float32 if value.is_floating_point() else dtype)

    def made(
        self, use: str, matrices: Sequence[Tensor], clips: Mapping[str, float]
    ) -> Tensor | None:
        """What a product multiplies with when its weight has turned, with gradients.

        None for what is neither quantized nor turns.
        """
        if (base := self.base.get(use)) is None:
            return None
        value = self._moved(use, base, matrices)
        if (entry := self.entries.get(use)) is not None:
            rows_nk = value if self.reads[use] == 1 else value.mT
            rounded_nk = fake(rows_nk, entry.weight, clips.get(use, 1.0))
            rows_nk = _toward(rows_nk, rounded_nk, entry)
            value = rows_nk if self.reads[use] == 1 else rows_nk.mT
        return self._typed(use, value)

    def rounded(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same with the rounding that the plan names, where it needs no data; no gradients."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for use, base in self.base.items():
                value = self._moved(use, base, matrices)
                if (entry := self.entries.get(use)) is not None:
                    rows_nk = value if self.reads[use] == 1 else value.mT
                    # a rounding that wants data is judged by what needs none
                    method = ROUNDINGS[without_data(entry.rounding)]
                    rounded = method.round(rows_nk.contiguous(), entry.weight, {})
                    rows_nk = _toward(rows_nk, rounded.dequantize(torch.float32), entry)
                    value = rows_nk if self.reads[use] == 1 else rows_nk.mT
                found[use] = self._typed(use, value)
        return found

    def clips(self) -> dict[str, float]:
        """Where the grids of weights end, by use, as they lose least before anything moves."""
        start = [torch.eye(n).repeat(h, 1, 1) for h, n in self.turning.shapes]
        start += [] if self.scaling is None else self.scaling.start()
        found: dict[str, float] = {}
        for use, entry in self.entries.items():
            value = self._moved(use, self.base[use], start)
            rows_nk = value if self.reads[use] == 1 else value.mT
            found[use] = best_clip(rows_nk[:CLIPPED].contiguous(), entry.weight)
        return found

    def _moved(self, use: str, base: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        value = self.turning.weight(use, base, parameters)
        if self.scaling is not None and use in self.scaling.sites:
            return self.scaling.weight(use, value, parameters[len(self.turning.stacks) :])
        return value

    def outputs(
        self, inputs: Inputs, weights: Mapping[str, Tensor], *, gradients: bool = False
    ) -> tuple[object, ...]:
        """What the quantized program returns."""
        return self.program.run(*fresh(inputs), weights=weights, gradients=gradients)

    def score(
        self,
        matrices: Sequence[Tensor],
        batches: Sequence[Inputs],
        wanted: Sequence[Sequence[object]],
    ) -> float:
        """The mean distance over batches, rounded as the plan says."""
        weights = self.rounded(matrices)
        found = [
            float(self.compared.distance(self.outputs(inputs, weights), want))
            for inputs, want in zip(batches, wanted, strict=True)
        ]
        return sum(found) / len(found)

    def _typed(self, use: str, value: Tensor) -> Tensor:
        dtype = read.dtype(self.program.node(use))
        return value if dtype is None else value.to(dtype)


def _toward(rows_nk: Tensor, nearest_nk: Tensor, entry: Quantized) -> Tensor:
    """A weight with as much of the nearest codes' errors as its rounding leaves; or all of them."""
    if not ROUNDINGS[entry.rounding].needs:
        return nearest_nk
    return rows_nk.to(nearest_nk.dtype).lerp(nearest_nk, LEFT)


def _without(weight: Weight, behind: Sequence[Step]) -> Weight:
    """A weight before its last steps."""
    return replace(weight, steps=weight.steps[: len(weight.steps) - len(behind)])


def _quantize_input(
    program: Program,
    matmul: Matmul,
    spec: QuantSpec,
    made: dict[tuple[str, QuantSpec], fx.Node],
) -> None:
    product, given = program.node(matmul.node), program.node(matmul.value)
    if (matmul.value, spec) not in made:

        def quantized(x: Tensor) -> Tensor:
            if isinstance(x, FakeTensor):
                # what it reads as may rest on its values, which it has none of
                return torch.empty_like(x)
            if x.requires_grad and torch.is_grad_enabled():
                return fake(x, spec)
            return as_read(x, spec).to(x.dtype)

        at = edit.after(program, given)
        made[matmul.value, spec] = edit.call(program, at, quantized, given, like=given)
    edit.redirect(product, given, made[matmul.value, spec])
