"""How much the outputs of a model move when a row of a product's output does.

With `g` the gradient of a random linear form of the outputs, an error `e` of a row moves them by
`(g e)^2` on average. The form is that of the Fisher information for distributions, and of a sum of
squares for other outputs; an error of no preferred direction costs `|g|^2 |e|^2 / n`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, fx

from qpass.calibrate.outputs import Outputs
from qpass.ir import Program, edit, fresh

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
    """The gradients `[m, n]` at the outputs of each product, batch after batch.

    `kept` says of each batch which tokens of the outputs count, None for all. The program runs in
    float, with its weights and all values of one batch in memory.
    """
    outputs = Outputs(program)
    probed, probes = _probed(program, products)
    weights = {use: program.value(program.node(use)) for use in program.weights}
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for inputs, counted in zip(batches, kept or [None] * len(batches), strict=True):
        values = dict[str, Tensor]()
        watch = _Watch(probes, values)
        made = probed.run(*fresh(inputs), weights=weights, watch=watch, gradients=True)
        form = outputs.random_form(made, generator, counted)
        if form is None or not form.requires_grad:
            return
        grads = torch.autograd.grad(
            form, list(values.values()), allow_unused=True, materialize_grads=True
        )
        for name, grad in zip(values, grads, strict=True):
            yield name, grad.reshape(-1, grad.shape[-1])


@final
class _Watch:
    """Keeps what probes pass on, by the product that they stand behind."""

    def __init__(self, probes: Mapping[str, str], values: dict[str, Tensor]) -> None:
        self._probes, self._values = probes, values

    def __call__(self, node: fx.Node, value: object) -> None:
        product = self._probes.get(node.name)
        if product is not None and isinstance(value, Tensor) and value.requires_grad:
            self._values[product] = value


def _probed(program: Program, products: Collection[str]) -> tuple[Program, dict[str, str]]:
    """The program with a node behind each product from which gradients flow on."""
    probed = program.clone()
    probes: dict[str, str] = {}
    for name in products:
        product = probed.node(name)
        users = list(product.users)
        probe = edit.call(probed, edit.after(probed, product), _leaf, product, like=product)
        for user in users:
            edit.redirect(user, product, probe)
        probes[probe.name] = name
    return probed, probes


def _leaf(x: Tensor) -> Tensor:
    """A value that gradients flow to, whatever it was made from."""
    return x if x.requires_grad else x.detach().requires_grad_()
