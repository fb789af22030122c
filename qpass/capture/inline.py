"""How regions that only set a mode become part of the graph around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from qpass.errors import CaptureFailed
from qpass.ir import edit, read
from qpass.ir.program import copy


def inline_regions(module: fx.GraphModule) -> fx.Graph:
    """A copy of the module's graph, with regions that only set a mode written in place.

    Raises `CaptureFailed` for regions that do more: control flow, automatic mixed precision.
    """
    graph = copy(module.graph)
    while region := _next_region(graph):
        body, args = _body(module, region)
        edit.inline(region, inline_regions(body), args)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def _next_region(graph: fx.Graph) -> fx.Node | None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return node
    return None


def _body(module: fx.GraphModule, region: fx.Node) -> tuple[fx.GraphModule, Sequence[object]]:
    """The graph that a region runs, and on what."""
    ops = torch.ops.higher_order
    args = read.plain_arguments(region)
    if region.target is ops.tag_activation_checkpoint:
        # what is kept for a backward pass makes no difference to values
        held, given = args[0], args[1:]
    elif region.target is ops.wrap_with_set_grad_enabled:
        held, given = args[1], args[2:]
    elif region.target is ops.wrap_with_autocast and args[2] is False:
        held, given = args[4], args[5:]
    elif region.target is ops.wrap_with_autocast:
        raise CaptureFailed(
            f"the model enters autocast to {args[1]} inside its forward, so its traced operators "
            "do not say in which precision they run\n  convert the model with .to(dtype) instead"
        )
    else:
        raise CaptureFailed(
            f"the graph holds {region.target}, a region that cannot be written in place\n"
            "  rewrite it without control flow that depends on tensor values"
        )
    name = cast("str", cast("fx.Node", held).target)
    return cast("fx.GraphModule", module.get_submodule(name)), given
