"""Which outputs of a program are distributions, and how far two results of it are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import find_heads, find_matmuls
from qpass.ir import Program, read

# rows drawn from at once
DRAWN = 256


@final
class Outputs:
    """What the outputs of a program are: scores of many choices, or numbers."""

    def __init__(self, program: Program) -> None:
        scores = _distributions(program)
        self._logits = [_made_by(node, scores) for node in program.outputs]

    @property
    def distributions(self) -> tuple[bool, ...]:
        """Of each output, whether it is scores of many choices."""
        return tuple(self._logits)

    def distance(self, got: Sequence[object], want: Sequence[object]) -> Tensor:
        """The mean over outputs: KL divergence of distributions, else the relative squared error.

        Outputs that are no floating tensors do not count.
        """
        parts: list[Tensor] = []
        for g, w, logits in zip(got, want, self._logits, strict=True):
            if not (isinstance(g, Tensor) and isinstance(w, Tensor) and w.is_floating_point()):
                continue
            g_nv, w_nv = _rows(g), _rows(w)
            if logits:
                log_p, log_q = w_nv.log_softmax(-1), g_nv.log_softmax(-1)
                parts.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            else:
                parts.append((g_nv - w_nv).square().sum() / w_nv.square().sum().clamp_min(1e-20))
        if not parts:
            return torch.zeros((), device="cpu", dtype=torch.float32)
        return torch.stack(parts).mean()

    def random_form(
        self, values: Sequence[object], generator: torch.Generator, kept: Tensor | None = None
    ) -> Tensor | None:
        """A random linear form whose square is on average what `distance` grows by, but for n.

        For a distribution it is the logarithm of what is drawn from it. Tokens that are not `kept`
        do not count. None without outputs that do.
        """
        parts: list[Tensor] = []
        for value, logits in zip(values, self._logits, strict=True):
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                continue
            # a mask of tokens says nothing about outputs that lie otherwise
            masked = kept is not None and value.shape[:-1] == kept.shape
            rows_nv = _rows(value[kept.to(torch.bool)] if masked and kept is not None else value)
            if not len(rows_nv):
                continue
            if logits:
                parts.append(surprise(rows_nv, generator))
            else:
                noise = torch.randn(rows_nv.shape, generator=generator).to(rows_nv)
                size = rows_nv.detach().square().mean().clamp_min(1e-20).sqrt()
                parts.append((rows_nv * noise).sum() / size)
        return torch.stack(parts).sum() if parts else None


def surprise(rows_nv: Tensor, generator: torch.Generator) -> Tensor:
    """The negative logarithm of what is drawn from each row's distribution, summed up."""
    with torch.no_grad():
        # a vocabulary is wide: some rows at a time
        chosen = torch.cat([_drawn(some, generator) for some in rows_nv.split(DRAWN)])
    return torch.nn.functional.cross_entropy(rows_nv, chosen, reduction="sum")


def _drawn(rows_nv: Tensor, generator: torch.Generator) -> Tensor:
    """A choice from the distribution of each row: the inverse of its sums, at a random height."""
    sums_nv = rows_nv.softmax(-1).cumsum(-1)
    height_n1 = torch.rand(len(rows_nv), 1, generator=generator, dtype=torch.float32)
    # heights are below one, and what has no probability is never reached
    at_n1 = torch.searchsorted(sums_nv, height_n1.to(sums_nv) * sums_nv[:, -1:], right=True)
    return at_n1.squeeze(-1).clamp_max(rows_nv.shape[-1] - 1)


def _rows(value: Tensor) -> Tensor:
    return value.float().reshape(-1, value.shape[-1] if value.dim() else 1)


def _distributions(program: Program) -> frozenset[str]:
    """The products that end a model with more numbers than they read: scores of many choices."""
    matmuls = find_matmuls(program)
    heads = find_heads(program, matmuls)
    wide: set[str] = set()
    for matmul in matmuls:
        shape = read.shape(program.node(matmul.use))
        if matmul.node in heads and int(shape[matmul.writes]) > int(shape[matmul.reads]):
            wide.add(matmul.node)
    return frozenset(wide)


def _made_by(node: fx.Node, names: frozenset[str]) -> bool:
    """Whether a value is what one of some nodes makes, in another shape or type or capped."""
    while node.name not in names:
        sources = [n for n in node.all_input_nodes if read.fake(n) is not None and read.shape(n)]
        if len(sources) != 1 or node.op == "placeholder":
            return False
        (node,) = sources
    return True
