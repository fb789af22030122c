"""How much the outputs of a model move when a row of a product's output does.

With `g` the gradient of a random linear form of the outputs, an error `e` of a row moves them by
`(g e)^2` on average. The form is that of the Fisher information for distributions, and of a sum of
squares for other outputs; an error of no preferred direction costs `|g|^2 |e|^2 / n`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.calibrate.backward import gradients_at
from qpass.calibrate.outputs import Outputs
from qpass.ir import Program

Inputs = Sequence[object]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What errors at the outputs of products cost.

    `rows` has `|g|^2 / n` of every row of a product's output, for each batch; `sums` has `g.T @ g`,
    float64 `[n, n]`. Without outputs that gradients can start from there are none.
    """

    rows: Mapping[str, list[Tensor]]
    sums: Mapping[str, Tensor]


def costs(
    program: Program,
    rows: Collection[str],
    sums: Mapping[str, str],
    batches: Sequence[Inputs],
    seed: int,
    kept: Sequence[Tensor | None] | None = None,
) -> Costs:
    """Rows of some products, and sums of others by what `sums` says of each: those alike are one.

    One pass over the data gives both.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in rows}
    summed: dict[str, Tensor] = {}
    wanted = {*rows, *sums}
    for name, rows_mn in gradients(program, wanted, batches, seed, kept) if wanted else ():
        if name in found:
            found[name].append(rows_mn.double().square().mean(-1).float())
        if (of := sums.get(name)) is not None:
            part_nn = (rows_mn.float().mT @ rows_mn.float()).double()
            summed[of] = summed[of].add_(part_nn) if of in summed else part_nn
    whole = {name: parts for name, parts in found.items() if len(parts) == len(batches)}
    return Costs(whole, summed)


def gradients(
    program: Program,
    products: Collection[str],
    batches: Sequence[Inputs],
    seed: int,
    kept: Sequence[Tensor | None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The gradients `[m, n]` at the outputs of each product, those of one in the order of batches.

    `kept` says of each batch which tokens of the outputs count, None for all. The program runs in
    float, with its weights and its values in memory as `gradients_at` has them.
    """
    outputs = Outputs(program)
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def form(at: int, made: Sequence[object]) -> Tensor | None:
        return outputs.random_form(made, generator, None if kept is None else kept[at])

    for name, grad in gradients_at(program, products, batches, form):
        yield name, grad.reshape(-1, grad.shape[-1])
