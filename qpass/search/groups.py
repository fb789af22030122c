"""Quantized products that have one transform in front of them: of one value, or of one layer."""

# m sampled rows, n output channels, k input channels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from qpass.analyze import Matmul
from qpass.ir import Program
from qpass.plan.chooser import Task
from qpass.rotations import Kronecker, Transform
from qpass.search.samples import Sample, applied, samples

# what candidates are compared on
HELD_CHANNELS = 512


@final
@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Products that read one value, or are one layer, and the transform that they have now."""

    sites: tuple[str, ...]
    products: tuple[Sample, ...]
    present: Transform | Kronecker | None

    @property
    def width(self) -> int:
        return int(self.products[0].x_mk.shape[1])

    def cost(
        self,
        held: Sequence[Tensor],
        transform: Transform | Kronecker | None,
        places: Tensor | None = None,
    ) -> float:
        """What errors of the held rows cost under a transform, of channels in another order."""
        total = 0.0
        for product, at_m in zip(self.products, held, strict=True):
            x_mk = product.x_mk[at_m]
            w_nk = product.w_nk[:: -(-len(product.w_nk) // HELD_CHANNELS)]
            want_mn = x_mk @ w_nk.mT
            if places is not None:
                x_mk, w_nk = x_mk[:, places], w_nk[:, places]
            if transform is not None:
                x_mk, w_nk = applied(transform, x_mk, 1), applied(transform, w_nk, -1)
            got_mn = product.read(x_mk) @ product.stored(w_nk).mT
            error_m = (got_mn - want_mn).square().mean(1)
            total += float((error_m * product.cost_m[at_m]).mean()) * len(product.w_nk)
        return total


def groups(task: Task) -> tuple[Program, list[Group]]:
    """The program without transforms in front of quantized products, and these, together."""
    plan = task.plan
    entries = {entry.site for entry in plan.quantized}
    present = {o.site: o.transform for o in plan.online}
    bare = replace(plan, online=tuple(o for o in plan.online if o.site not in entries))
    after, found = samples(task, bare)
    made: list[Group] = []
    for together in _together(after, [s.matmul for s in found.values()]):
        sites = tuple(dict.fromkeys(after.site(m.use) for m in together))
        held = {present.get(site) for site in sites}
        if len(held) > 1 or len({found[m.use].x_mk.shape[1] for m in together}) > 1:
            continue
        made.append(Group(sites, tuple(found[m.use] for m in together), held.pop()))
    return after, made


def _together(after: Program, matmuls: Sequence[Matmul]) -> list[list[Matmul]]:
    """Products that share a value or a layer."""
    first: dict[str, int] = {}
    one = list(range(len(matmuls)))
    for i, matmul in enumerate(matmuls):
        for key in (f"value {matmul.value}", f"site {after.site(matmul.use)}"):
            other, mine = one[first.setdefault(key, i)], one[i]
            one = [other if at == mine else at for at in one]
    return [
        [m for m, at in zip(matmuls, one, strict=True) if at == each] for each in dict.fromkeys(one)
    ]
