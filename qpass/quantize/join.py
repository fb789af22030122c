"""Which linear maps run as one product: those of one value that are quantized alike.

A product costs a call and a hand-over to other threads whatever its size, which is much of the time
of a token; the outputs are slices of one tensor, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from qpass.analyze import Matmul, find_matmuls
from qpass.ir import Join, Program, edit, read
from qpass.plan import Quantized

aten = torch.ops.aten


def join_products(program: Program, choices: Mapping[str, Quantized]) -> dict[str, str]:
    """Join what can be; says for each site that now lies in the product of another which that is.

    `choices` are those of the sites by name. Codes are as without: every row has scales of its own.
    """
    groups: dict[object, list[Matmul]] = {}
    for matmul in find_matmuls(program):
        choice = choices.get(program.site(matmul.use))
        if choice is None or not _joins(program, matmul):
            continue
        if choice.weight.block == "tensor" or choice.weight.tensor_scale:
            # one scale for all rows would be another one for more rows
            continue
        key = (matmul.value, matmul.bias is None, replace(choice, site=""))
        groups.setdefault(key, []).append(matmul)
    joined: dict[str, str] = {}
    for group in groups.values():
        if len(group) > 1:
            _join(program, group)
            first, *others = (program.site(matmul.use) for matmul in group)
            joined |= {site: first for site in others if site != first}
    return joined


def _joins(program: Program, matmul: Matmul) -> bool:
    linear = read.calls(program.node(matmul.node), aten.linear.default)
    return linear and read.static_shape(program.node(matmul.use)) is not None


def _join(program: Program, group: Sequence[Matmul]) -> None:
    nodes = [program.node(matmul.node) for matmul in group]
    first, value = nodes[0], program.node(group[0].value)
    weight = _joined(program, [matmul.use for matmul in group])
    biases = [matmul.bias for matmul in group if matmul.bias is not None]
    bias = _joined(program, biases) if biases else None
    whole = edit.call(program, first, aten.linear.default, value, weight, bias, like=first)
    last = len(read.shape(whole)) - 1
    at = 0
    for node in nodes:
        end = at + int(read.shape(node)[last])
        part = edit.call(program, first, aten.slice.Tensor, whole, last, at, end, like=node)
        edit.replace(node, part)
        at = end


def _joined(program: Program, uses: Sequence[str]) -> fx.Node:
    """A use of all these weights, one behind the other on their first axis."""
    first, *others = uses
    weight = program.weights[first]
    for other in others:
        weight = weight.then(Join(program.weights[other], 0))
    shapes = [read.shape(program.node(use)) for use in uses]
    length = sum(int(shape[0]) for shape in shapes)
    shape = (length, *(int(size) for size in shapes[0][1:]))
    dtype = read.dtype(program.node(first))
    assert dtype is not None
    like = edit.fake_like(program, shape, dtype)
    return edit.add_weight(program, f"{first}_joined", weight, like, program.owners.get(first))
