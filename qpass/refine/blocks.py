"""Blocks of a model are rounded as wholes: codes and scales by gradients of what a block gives.

As in "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound, 2020) codes are
learned, and as in "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction"
(2021) for all weights of a block at once, from the error of its output weighed by the Fisher
information of the model's own. Codes and scales move by the signs of straight-through gradients
under a rate that falls to zero, as in "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs" (AutoRound, 2023). Different from these papers: the start are the codes that a
rounding has found, whatever it is, a block's inputs are those of the quantized model, the Fisher
information has directions besides its diagonal, and a block keeps its start unless held-out data
say that the end is better. Checked: no error on held-out data grows, and codes read as they are
stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from qpass.calibrate.rounded import SEED
from qpass.calibrate.stream import Values, run_part
from qpass.ir import Note, Program, last_uses, read
from qpass.plan import Role
from qpass.plan.refiner import REFINERS, Refiner, Refining
from qpass.refine.bottlenecks import Block, find_blocks
from qpass.refine.errors import Cost, find_costs
from qpass.refine.pair import Pair
from qpass.refine.soft import SoftWeight

# one batch of so many is held out
HELD = 4


@final
@dataclass(frozen=True, slots=True)
class Blocks(Refiner):
    """A number of `passes` over the data.

    In all steps together a place can come as far as `rate`, in points, and a scale as far as
    `scale_rate`, in parts of itself.
    """

    name: str = "blocks"
    passes: int = 8
    rate: float = 0.0
    scale_rate: float = 0.02
    keep: float = 1.0

    def refine(self, task: Refining) -> tuple[Note, ...]:
        pair = Pair(task)
        linear = {
            node: m for node, m in pair.products.items() if pair.entries[m.use].role is Role.LINEAR
        }
        sizes = {n: _size(task.program, m.use) for n, m in linear.items()}
        blocks = find_blocks(task.program, sizes)
        if not blocks:
            why = "no value of the model is a bottleneck after its products"
            return (Note(False, self.name, why),)
        costs = find_costs(task, [end.name for block in blocks for end in block.ends])
        before = after = 0.0
        gained = 0
        for at, block in enumerate(blocks):
            task.advance("refine blocks", at, len(blocks))
            starts = pair.quantized.before(block.first)
            wants = [pair.float.advance(end.name) for end in block.ends]
            found = _Training(self, task, pair, block, starts, wants, costs).carry_out()
            before, after = before + found[0], after + found[1]
            gained += found[1] < found[0]
        task.advance("refine blocks", len(blocks), len(blocks))
        why = f"{gained} of {len(blocks)} blocks: held-out error {before:.4g} becomes {after:.4g}"
        return (Note(gained > 0, self.name, why),)


@final
class _Training:
    """One block: its inputs in the quantized model, and its outputs in the float one."""

    def __init__(
        self,
        method: Blocks,
        task: Refining,
        pair: Pair,
        block: Block,
        starts: Sequence[Values],
        wants: Sequence[Sequence[Tensor]],
        costs: Mapping[str, Cost],
    ) -> None:
        self._method, self._task, self._pair, self._block = method, task, pair, block
        self._starts, self._wants, self._costs = starts, wants, costs
        program = task.program
        self._uses = {pair.products[name].use for name in block.products}
        self._site = {use: program.site(use) for use in self._uses}
        self._soft: dict[str, SoftWeight] = {}
        for use in sorted(self._uses):
            codes, like = task.codes.get(self._site[use]), read.dtype(program.node(use))
            if codes is not None and like is not None and self._site[use] not in self._soft:
                weight_nk = pair.weight_nk(use)
                self._soft[self._site[use]] = SoftWeight(codes, weight_nk, like, method.keep)
        self._fixed: dict[fx.Node, Tensor] = {}
        last = last_uses(program.graph)
        self._last = {
            node: [dead for dead in last.get(node, ()) if dead not in block.ends]
            for node in block.nodes
        }

    def carry_out(self) -> tuple[float, float]:
        """The mean costs on held-out data before and after; better codes are put in place."""
        learned, held = split(len(self._starts))
        before = self._mean(held)
        self._learn(learned)
        after = self._mean(held)
        if not after < before:
            return before, before
        for site, soft in self._soft.items():
            self._task.codes.put(site, soft.codes())
        return before, after

    def _learn(self, learned: Sequence[Part]) -> None:
        method = self._method
        generator = torch.Generator(device="cpu").manual_seed(SEED)
        softs = list(self._soft.values())
        places = [soft.place_ngl for soft in softs]
        scales = [p for soft in softs for p in soft.scales]
        steps = method.passes * len(learned)
        order: list[int] = []
        for step in range(steps):
            if step % len(learned) == 0:
                order = torch.randperm(len(learned), generator=generator).tolist()
            part = learned[order[step % len(learned)]]
            grads = torch.autograd.grad(self._cost(part, gradients=True), [*places, *scales])
            # a rate that falls to zero along a line comes to half of its start times the steps
            share = 2 * (1 - step / steps) / steps
            with torch.no_grad():
                for place, grad in zip(places, grads, strict=False):
                    place.sub_(grad.sign_(), alpha=method.rate * share)
                for scale, grad in zip(scales, grads[len(places) :], strict=True):
                    scale.sub_(grad.sign_(), alpha=method.scale_rate * share)

    def _mean(self, parts: Sequence[Part]) -> float:
        return sum(float(self._cost(part)) for part in parts) / len(parts)

    def _cost(self, part: Part, *, gradients: bool = False) -> Tensor:
        batch, half = part
        values = {node: self._starts[batch][node] for node in self._block.alive}
        made: dict[str, Tensor] = {}

        def weight(of: fx.Node) -> Tensor | None:
            if self._task.program.weight(of) is None:
                return None
            if (site := self._site.get(of.name)) is not None:
                if site not in made:
                    made[site] = self._soft[site].value()
                return self._pair.laid(of.name, made[site])
            if of not in self._fixed:
                stored = self._pair.stored(of.name)
                self._fixed[of] = self._task.program.value(of) if stored is None else stored
            return self._fixed[of]

        with torch.set_grad_enabled(gradients):
            reads = self._pair.activations
            nodes = self._block.nodes
            run_part(nodes, values, weight, reads, self._last, gradients=gradients)
            parts: list[Tensor] = []
            for end, wants in zip(self._block.ends, self._wants, strict=True):
                got, want = values[end], wants[batch]
                assert isinstance(got, Tensor)
                rows = want.shape[:-1].numel()
                counted = None if half is None else torch.arange(rows) % 2 == half
                parts.append(self._costs[end.name].of(batch, (got - want).float(), counted))
            return torch.stack(parts).sum()


# a batch, and which rows of it count: all, or every second one
Part = tuple[int, int | None]


def split(count: int) -> tuple[list[Part], list[Part]]:
    """Data to learn from and data to judge by; of one batch, every second row."""
    if count == 1:
        return [(0, 0)], [(0, 1)]
    held = [at for at in range(count) if at % HELD == HELD - 1] or [count - 1]
    return [(at, None) for at in range(count) if at not in held], [(at, None) for at in held]


def _size(program: Program, use: str) -> int:
    shape = read.shape(program.node(use))
    return int(shape[0]) * int(shape[1])


REFINERS.add(Blocks())
