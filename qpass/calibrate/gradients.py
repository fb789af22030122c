"""How much the outputs of a model move when a row of a product's output does.

With `g` the gradient of a random linear form of the outputs, an error `e` of a row moves them by
`(g e)^2` on average. The form is that of the Fisher information for distributions, and of a sum of
squares for other outputs; an error of no preferred direction costs `|g|^2 |e|^2 / n`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qpass.calibrate.backward import gradients_at
from qpass.calibrate.outputs import Outputs
from qpass.ir import Program

Inputs = Sequence[object]


def importance(
    program: Program,
    products: Collection[str],
    batches: Sequence[Inputs],
    seed: int,
    kept: Sequence[Tensor | None] | None = None,
) -> Mapping[str, list[Tensor]]:
    """For each product and batch, `|g|^2 / n` of every row of the product's output."""
    found: dict[str, list[Tensor]] = {name: [] for name in products}
    for name, rows_mn in gradients(program, products, batches, seed, kept):
        found[name].append(rows_mn.double().square().mean(-1).float())
    return {name: rows for name, rows in found.items() if len(rows) == len(batches)}


def output_hessians(
    program: Program,
    products: Mapping[str, str],
    batches: Sequence[Inputs],
    seed: int,
    kept: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """`g.T @ g`, float64 `[n, n]`, by what `products` says of each product: those alike are summed.

    Without outputs that gradients can start from there are none.
    """
    found: dict[str, Tensor] = {}
    for name, rows_mn in gradients(program, products, batches, seed, kept):
        part_nn = (rows_mn.float().mT @ rows_mn.float()).double()
        known = found.get(products[name])
        found[products[name]] = part_nn if known is None else known.add_(part_nn)
    return found


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
