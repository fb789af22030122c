"""A part of a program in training: codes, scales and vectors by gradients of what it should give.

Steps are those of Adam ("Adam: A Method for Stochastic Optimization", 2014) under rates that fall
to zero along a line, one batch to a step. All that is learned is read as it will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, fx

from qpass.calibrate.rounded import SEED
from qpass.calibrate.stream import Values, run_part
from qpass.ir import Add, Numbers, Program, Weight, last_uses, read
from qpass.plan.refiner import Refining
from qpass.refine.bottlenecks import Block
from qpass.refine.pair import Pair
from qpass.refine.soft import SoftWeight

# one batch of so many is held out
HELD = 4
# how fast the first and second moments of gradients are forgotten
FORGETS = (0.1, 0.05)
TINY = 1e-20

# a batch, and which rows of it count: all, or every second one
Part = tuple[int, int | None]
# of the batch, of what the ends are and should be, and of the rows that count
Loss = Callable[[int, Sequence[Tensor], Sequence[Tensor], int | None], Tensor]


def split(count: int) -> tuple[list[Part], list[Part]]:
    """Data to learn from and data to judge by; of one batch, every second row."""
    if count == 1:
        return [(0, 0)], [(0, 1)]
    held = [at for at in range(count) if at % HELD == HELD - 1] or [count - 1]
    return [(at, None) for at in range(count) if at not in held], [(at, None) for at in held]


def counted(error: Tensor, half: int | None) -> Tensor | None:
    """Which rows of a value a half of a batch has, None for all."""
    rows = error.shape[:-1].numel()
    return None if half is None else torch.arange(rows, device=error.device) % 2 == half


def taken(wants: Sequence[Sequence[Tensor]]) -> Callable[[int], list[Tensor]]:
    """What the ends of a block should be, from lists by end and batch."""
    return lambda batch: [want[batch] for want in wants]


@final
@dataclass(slots=True, eq=False)
class Training:
    """A block between its inputs in the quantized model and its ends in the float one.

    `wants` gives what the ends should be, for a batch. `softs` are the weights in training by site,
    `vectors` those that stay float by use.
    """

    task: Refining
    pair: Pair
    block: Block
    starts: Sequence[Values]
    wants: Callable[[int], Sequence[Tensor]]
    loss: Loss
    softs: dict[str, SoftWeight] = field(default_factory=dict[str, SoftWeight])
    vectors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _fixed: dict[fx.Node, Tensor] = field(default_factory=dict[fx.Node, Tensor])
    _last: Mapping[fx.Node, Sequence[fx.Node]] = field(
        default_factory=dict[fx.Node, Sequence[fx.Node]]
    )

    def __post_init__(self) -> None:
        last, ends = last_uses(self.task.program.graph), set(self.block.ends)
        self._last = {
            node: [dead for dead in last.get(node, ()) if dead not in ends]
            for node in self.block.nodes
        }

    def soften(self, keep: float, *, relaxed: bool = False) -> None:
        """Let all weights of the block's products change that are quantized."""
        program = self.task.program
        for name in self.block.products:
            use = self.pair.products[name].use
            site, like = program.site(use), read.dtype(program.node(use))
            codes = self.task.codes.get(site)
            if codes is not None and like is not None and site not in self.softs:
                self.softs[site] = SoftWeight(
                    codes, self.pair.weight_nk(use), like, keep, relaxed=relaxed
                )

    def mean(self, parts: Sequence[Part]) -> float:
        """The mean loss on some data, without gradients."""
        return sum(float(self._cost(part)) for part in parts) / len(parts)

    def learn(
        self,
        groups: Sequence[tuple[Sequence[Tensor], float]],
        learned: Sequence[Part],
        passes: int,
        settle: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Change parameters in so many passes over the data.

        The number of each group is how far its entries can come in all steps together. `settle` is
        called after each step with the part of the way that it was.
        """
        generator = torch.Generator(device="cpu").manual_seed(SEED)
        given = [(value, far) for values, far in groups for value in values if far > 0]
        if not given or not learned:
            return
        first = [torch.zeros_like(value) for value, _ in given]
        second = [torch.zeros_like(value) for value, _ in given]
        steps = passes * len(learned)
        order: list[int] = []
        for step in range(steps):
            if step % len(learned) == 0:
                order = torch.randperm(len(learned), generator=generator).tolist()
            loss = self._cost(learned[order[step % len(learned)]], gradients=True)
            if not loss.requires_grad:
                return
            grads = torch.autograd.grad(
                loss, [value for value, _ in given], allow_unused=True, materialize_grads=True
            )
            # rates along a line to zero come to half of the first times the steps
            share = 2 * (1 - step / steps) / steps
            one, two = (1 - (1 - forgets) ** (step + 1) for forgets in FORGETS)
            with torch.no_grad():
                for at, ((value, far), grad) in enumerate(zip(given, grads, strict=True)):
                    first[at].lerp_(grad, FORGETS[0])
                    second[at].lerp_(grad.square(), FORGETS[1])
                    size = (second[at] / two).sqrt_().add_(TINY)
                    value.addcdiv_(first[at], size, value=-far * share / one)
                settle(share)

    def keep(self) -> None:
        """Put what has been learned in the place of what was there."""
        for site, soft in self.softs.items():
            self.task.codes.put(site, soft.codes())
        for use, value in self.vectors.items():
            put_vector(self.task.program, use, value)

    def _cost(self, part: Part, *, gradients: bool = False) -> Tensor:
        batch, half = part
        program = self.task.program
        values: Values = {node: self.starts[batch][node] for node in self.block.alive}
        made: dict[str, Tensor] = {}

        def weight(of: fx.Node) -> Tensor | None:
            if program.weight(of) is None:
                return None
            site = program.site(of.name)
            if site in self.softs:
                if site not in made:
                    made[site] = self.softs[site].value()
                return self.pair.laid(of.name, made[site])
            if of.name in self.vectors:
                like = read.dtype(of)
                assert like is not None
                return self.vectors[of.name].to(like)
            if of not in self._fixed:
                stored = self.pair.stored(of.name)
                self._fixed[of] = program.value(of) if stored is None else stored
            return self._fixed[of]

        with torch.set_grad_enabled(gradients):
            reads, nodes = self.pair.activations, self.block.nodes
            run_part(nodes, values, weight, reads, self._last, gradients=gradients)
            got: list[Tensor] = []
            for end in self.block.ends:
                value = values[end]
                assert isinstance(value, Tensor)
                got.append(value)
            return self.loss(batch, got, self.wants(batch), half)


def put_vector(program: Program, use: str, value: Tensor) -> None:
    """Let a use of a weight that stays float have another value."""
    weight = program.weights[use]
    change = value.detach().double().cpu() - weight.evaluate(program.sources)
    numbers = Weight(None, (Numbers(tuple(change.tolist())),))
    program.weights[use] = weight.then(Add(numbers))
