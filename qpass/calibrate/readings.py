"""Where the grids of a plan's activations end, from the values that products read in float.

All values that one site reads get one spec, and so do all sites that read one value: they share the
work of quantizing it.
"""

# m rows, n output channels, k input channels, g blocks of a row

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.calibrate.gradients import costs
from qpass.calibrate.rounded import SEED, Calibration
from qpass.calibrate.stages import Stage, entries_of, find_stages
from qpass.calibrate.statistics import kept_rows
from qpass.calibrate.stream import Stream
from qpass.calibrate.tokens import token_weights
from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ir import Program
from qpass.plan import Plan, Quantized, Recipe
from qpass.plan.recipe import AUTO
from qpass.ranges import RANGES, Seen

Advance = Callable[[int, int], None]
# what "auto" is where it chooses at all, and up to how many bits it does for dynamic grids
CHOSEN, FEW_BITS = "mse", 4


def expect_ranges(recipe: Recipe, *, given: bool) -> None:
    """Raise BadInput for a recipe whose ranges rest on data, where there is none."""
    spec = recipe.activation
    if given or spec is None or spec.scale is not None:
        return
    if spec.static:
        raise BadInput(
            "activation.dynamic = false: its scales are measured, and there is no data\n"
            "  quantize with calibration data, give a plan that has them, or set "
            "activation.dynamic = true"
        )
    if recipe.ranges not in (AUTO, "minmax"):
        raise BadInput(
            f"ranges = {recipe.ranges!r}: is found from data, and there is none\n"
            '  quantize with calibration data, or set ranges = "auto"'
        )


def with_ranges(
    program: Program,
    plan: Plan,
    data: Calibration,
    advance: Advance = lambda _at, _of: None,
) -> tuple[Plan, Calibration]:
    """The plan with every scale and clip that its recipe leaves to the data.

    The data comes back with the weights of its tokens where these were needed.
    """
    entries = entries_of(program, plan)
    left = {use: e for use, e in entries.items() if _open(plan.recipe, e.activation)}
    if not left:
        return plan, data
    if plan.recipe.weigh_tokens and data.weights is None:
        every = find_stages(program, entries)
        rows = {m.node for s in every for m in (*s.products, *s.again)}
        found = costs(program, rows, {}, data.batches, SEED, data.kept)
        data = replace(data, weights=token_weights(every, found.rows))
    chosen = _choices(program, plan.recipe, left, data, advance)
    quantized = [replace(q, activation=chosen.get(q.site, q.activation)) for q in plan.quantized]
    return replace(plan, quantized=tuple(quantized)), data


def _open(recipe: Recipe, spec: QuantSpec | None) -> bool:
    """Whether the data decides where a grid ends."""
    if spec is None or spec.static:
        return spec is not None and spec.scale is None
    searched = recipe.ranges == CHOSEN or (recipe.ranges == AUTO and spec.codes.bits <= FEW_BITS)
    plain = spec.symmetric and spec.integers and spec.scales.signed
    return searched and plain and spec.clip == 1


def _choices(
    program: Program,
    recipe: Recipe,
    entries: Mapping[str, Quantized],
    data: Calibration,
    advance: Advance,
) -> dict[str, QuantSpec]:
    """The spec of every site among `entries`."""
    found = RANGES[CHOSEN if recipe.ranges == AUTO else recipe.ranges]
    stages = find_stages(program, entries)
    read = [
        _Read.of(program, stage, spec, entries)
        for stage in stages
        for spec in _specs(stage, entries)
    ]
    group = _grouped(read)
    stream = Stream(program, data.batches, lambda _: None, {})
    seen: dict[str, Seen] = {}
    for at, one in enumerate(read):
        advance(at, len(read))
        into = seen.setdefault(group[one.sites[0]], Seen())
        for batch, x in enumerate(stream.advance(one.value)):
            weights = None if data.weights is None else data.weights.get(one.value)
            cost_m = None if weights is None else weights[batch]
            one.count(into, *kept_rows(x, cost_m, data.kept[batch]))
    advance(len(read), len(read))
    specs = {site: one.spec for one in read for site in one.sites}
    whole = {name: found.choose(into, specs[name]) for name, into in seen.items()}
    return {site: whole[name] for site, name in group.items()}


def _specs(stage: Stage, entries: Mapping[str, Quantized]) -> list[QuantSpec]:
    specs = dict.fromkeys(entries[m.use].activation for m in (*stage.products, *stage.again))
    return [spec for spec in specs if spec is not None]


def _grouped(read: Sequence[_Read]) -> dict[str, str]:
    """For each site the name of its group: sites that read one value, and so on from these."""
    group: dict[str, str] = {}
    for one in read:
        known = {group[site] for site in one.sites if site in group}
        name = min((*known, one.sites[0]))
        group |= dict.fromkeys((*one.sites, *(s for s, g in group.items() if g in known)), name)
    return group


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A value, what it is read as, by the products of which sites, and what errors cost them.

    `cost_k` is the squared length of what reads each channel.
    """

    value: str
    spec: QuantSpec
    sites: tuple[str, ...]
    cost_k: Tensor

    @staticmethod
    def of(
        program: Program, stage: Stage, spec: QuantSpec, entries: Mapping[str, Quantized]
    ) -> _Read:
        products = [m for m in (*stage.products, *stage.again) if entries[m.use].activation == spec]
        costs: list[Tensor] = []
        for matmul in products:
            weight = program.weights[matmul.use].evaluate(program.sources)
            costs.append(weight.double().square().sum(1 - matmul.reads))
        sites = dict.fromkeys(entries[m.use].site for m in products)
        return _Read(stage.value, spec, tuple(sites), torch.stack(costs).sum(0).float())

    def count(self, seen: Seen, x_mk: Tensor, cost_m: Tensor | None) -> None:
        """Add rows, whose tokens cost `cost_m`, to what was seen."""
        if not bool(x_mk.isfinite().all()):
            raise BadInput(
                f"calibration: the values at {self.value} are not finite\n"
                "  look for NaN or infinity in the data, or calibrate the model in float32"
            )
        x_mk = x_mk.float()
        cost_mk = self.cost_k.expand(x_mk.shape)
        if cost_m is not None:
            cost_mk = cost_mk * cost_m.float().unsqueeze(1)
        if self.spec.dynamic:
            block = self.spec.block if isinstance(self.spec.block, int) else x_mk.shape[1]
            x_mgl = x_mk.reshape(len(x_mk), -1, block)
            extreme_mg1 = x_mgl.abs().amax(-1, keepdim=True)
            safe_mg1 = torch.where(extreme_mg1 > 0, extreme_mg1, 1.0)
            cost_mk = (cost_mk.reshape(x_mgl.shape) * extreme_mg1.square()).reshape(x_mk.shape)
            x_mk = (x_mgl / safe_mg1).reshape(x_mk.shape)
        seen.add(x_mk, cost_mk)
