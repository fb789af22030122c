"""The float model and the quantized one, side by side on the same data."""

from __future__ import annotations

from typing import final

from torch import Tensor

from qpass.analyze import find_matmuls
from qpass.calibrate.stages import entries_of
from qpass.calibrate.stream import Stream, activations_of
from qpass.ir import read
from qpass.plan.refiner import Refining


@final
class Pair:
    """Both models as streams; the quantized one reads whatever the codes are when it gets there."""

    def __init__(self, task: Refining) -> None:
        self._task = task
        matmuls = find_matmuls(task.program)
        self._reads = {m.use: m.reads for m in matmuls}
        self.entries = entries_of(task.program, task.plan)
        self.products = {m.node: m for m in matmuls if m.use in self.entries}
        activations = {u: e.activation for u, e in self.entries.items() if e.activation}
        self.activations = activations_of(task.program, activations)
        self.float = Stream(task.reference, task.batches, lambda _: None, {})
        self.quantized = Stream(task.program, task.batches, self.stored, activations)

    def stored(self, use: str) -> Tensor | None:
        """A quantized weight as the graph reads it, None for one that is not quantized."""
        codes = self._task.codes.get(self._task.program.site(use))
        if codes is None:
            return None
        like = read.dtype(self._task.program.node(use))
        assert like is not None
        return self.laid(use, codes.dequantize(like))

    def laid(self, use: str, value_nk: Tensor) -> Tensor:
        """A weight `[n, k]` in the layout of a use of it."""
        return value_nk.mT if self._reads.get(use, 1) == 0 else value_nk

    def weight_nk(self, use: str) -> Tensor:
        """The float weight `[n, k]` of a use."""
        value = self._task.reference.weights[use].evaluate(self._task.reference.sources)
        return value if self._reads.get(use, 1) == 1 else value.mT.contiguous()
