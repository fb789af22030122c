"""How much the outputs of a model move when a row of a product's output does.

With `g` the gradient of a random linear form of the outputs, an error `e` of a row moves them by
`(g e)^2` on average. The form is that of the Fisher information for distributions, and of a sum of
squares for other outputs; an error of no preferred direction costs `|g|^2 |e|^2 / n`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, fx

from qpass.ir import Program, edit
from qpass.search.outputs import Outputs
from qpass.search.trial import Inputs, fresh


def importance(
    program: Program, products: Collection[str], batches: Sequence[Inputs], seed: int
) -> Mapping[str, list[Tensor]]:
    """For each product and batch, `|g|^2 / n` of every row of the product's output."""
    outputs = Outputs(program)
    probed, probes = _probed(program, products)
    weights = {
        use: weight.evaluate(program.sources).to(program.node(use).meta["val"].dtype)
        for use, weight in program.weights.items()
    }
    generator = torch.Generator(device="cpu").manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in products}
    for inputs in batches:
        values = dict[str, Tensor]()
        watch = _Watch(probes, values)
        made = probed.run(*fresh(inputs), weights=weights, watch=watch, gradients=True)
        form = outputs.random_form(made, generator)
        if form is None or not form.requires_grad:
            return {}
        names = list(values)
        grads = torch.autograd.grad(
            form, [values[n] for n in names], allow_unused=True, materialize_grads=True
        )
        for name, grad in zip(names, grads, strict=True):
            rows = grad.reshape(-1, grad.shape[-1]).double()
            found[name].append(rows.square().mean(-1).float())
    return {name: rows for name, rows in found.items() if len(rows) == len(batches)}


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
