"""How products are rounded on calibration data: in order, on what they will really read.

A product's statistics are those of its input in the model as it is quantized so far, so that later
products make up for what earlier ones lost; rounding rests on them and on nothing else, so a run
that is cut off and taken up again gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from qpass.analyze import Matmul, find_tables
from qpass.calibrate.codes import Codes
from qpass.calibrate.gradients import costs
from qpass.calibrate.stages import entries_of, find_stages
from qpass.calibrate.statistics import COMPARING, Statistics
from qpass.calibrate.store import Store
from qpass.calibrate.stream import Stream, as_quantized
from qpass.calibrate.tokens import token_weights
from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ir import Program, pieces, read
from qpass.plan import Plan, Quantized, Role
from qpass.rounding import ROUNDINGS, Statistic, Stats, round_parts

# which model a product's inputs come from while the ones before it are quantized
Propagate = Literal["quantized", "float"]
Advance = Callable[[int, int], None]
# of what is drawn from the distributions that a model returns
SEED = 0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The data: flat inputs of a program for each batch, and which of its tokens count.

    `kept` has one mask `[...]` of tokens for each batch, or None where all count. `weights` are
    those of `token_weights`, where somebody has measured them.
    """

    batches: Sequence[Sequence[object]]
    kept: Sequence[Tensor | None]
    propagate: Propagate = "quantized"
    weights: Mapping[str, Sequence[Tensor]] | None = None

    def __post_init__(self) -> None:
        if not self.batches:
            raise BadInput("calibration has no batches")
        if len(self.kept) != len(self.batches):
            raise BadInput(f"{len(self.kept)} masks for {len(self.batches)} batches")


def needs_data(plan: Plan) -> tuple[str, ...]:
    """The sites of a plan whose rounding needs statistics."""
    return tuple(q.site for q in plan.quantized if _needs(q))


def round_products(
    program: Program,
    plan: Plan,
    data: Calibration,
    store: Store | None = None,
    advance: Advance = lambda _at, _of: None,
) -> Codes:
    """The codes of every quantized weight of `program` by site, rounded on the data.

    What `store` holds of an earlier run is taken from there. Raises BadInput for data that gives
    statistics which are not finite.
    """
    return _Run(program, plan, data, store).all(advance)


@final
class _Run:
    def __init__(
        self, program: Program, plan: Plan, data: Calibration, store: Store | None
    ) -> None:
        self._program, self._data, self._store = program, data, store
        self._entries = entries_of(program, plan)
        self._stages = find_stages(program, self._entries)
        products = [m for s in self._stages for m in (*s.products, *s.again)]
        self._reads = {m.use: m.reads for m in products}
        self._codes = Codes()
        self._round_tables({q.site: q for q in plan.quantized if q.role is Role.EMBEDDING})
        wanted = {s for e in self._entries.values() for s in _needs(e)}
        self._outputs: dict[str, Tensor] = {}
        self._weights: Mapping[str, Sequence[Tensor]] = {}
        self._weighed = plan.recipe.weigh_tokens
        self._float = self._quantized = None
        if data.propagate == "float" or wanted & COMPARING:
            self._float = self._stream(quantized=False)
        if data.propagate == "quantized":
            self._quantized = self._stream(quantized=True)

    def all(self, advance: Advance) -> Codes:
        if self._store is not None:
            for site, codes in self._store.read(self._entries.values()):
                self._codes.put(site, codes)
        advance(0, len(self._stages))
        self._weigh()
        shared = self._of_shared_sites()
        for at, stage in enumerate(self._stages):
            advance(at, len(self._stages))
            left = [m for m in stage.products if self._entries[m.use].site not in self._codes]
            if left:
                self._round(stage.value, left, shared)
        advance(len(self._stages), len(self._stages))
        return self._codes

    def _round(self, value: str, products: Sequence[Matmul], shared: Mapping[str, Stats]) -> None:
        """Round products of one value; those that read it alike share its statistics."""
        groups: dict[QuantSpec | None, list[Matmul]] = {}
        for matmul in products:
            groups.setdefault(self._entries[matmul.use].activation, []).append(matmul)
        for activation, group in groups.items():
            entries = [self._entries[m.use] for m in group]
            own = {s for e in entries if e.site not in shared for s in _of_inputs(e)}
            stats = self._measured(value, activation, own) if own else {}
            for matmul, entry in zip(group, entries, strict=True):
                self._put(entry, matmul, shared.get(entry.site, stats))

    def _put(self, entry: Quantized, matmul: Matmul, stats: Stats) -> None:
        method = ROUNDINGS[entry.rounding]
        given = {statistic: stats[statistic] for statistic in _of_inputs(entry)}
        if Statistic.OUTPUT_HESSIAN in method.needs:
            given[Statistic.OUTPUT_HESSIAN] = self._outputs.pop(entry.site)
        weight, sources = self._program.weights[matmul.use], self._program.sources
        parts_nk = pieces.along_outputs(weight, sources, matmul.reads)
        codes = round_parts(method, parts_nk, entry.weight, given)
        self._codes.put(entry.site, codes)
        if self._store is not None and method.needs:
            self._store.write(entry.site, codes)

    def _measured(
        self, value: str, activation: QuantSpec | None, wanted: Iterable[Statistic]
    ) -> Stats:
        found = Statistics(wanted, len(self._data.batches))
        # one stream may stand for both; each is advanced before its values are looked at
        reference = None if self._float is None else self._float.advance(value)
        seen = reference if self._quantized is None else self._quantized.advance(value)
        assert seen is not None
        rows = zip(seen, reference or seen, self._data.kept, strict=True)
        for at, (x, y, kept) in enumerate(rows):
            found.add(at, as_quantized(x, activation), y, kept, self._weight(value, at))
        return _finite(found.result(), value)

    def _of_shared_sites(self) -> dict[str, Stats]:
        """Statistics over all inputs of each weight that is read in several places, in float.

        It is rounded before the model that its later inputs come from is known.
        """
        sites = {self._entries[m.use].site for s in self._stages for m in s.again}
        wanted = {
            site: needs
            for site in sites
            if site not in self._codes
            and (needs := _of_inputs(next(e for e in self._entries.values() if e.site == site)))
        }
        if not wanted:
            return {}
        stream, count = self._stream(quantized=False), len(self._data.batches)
        found = {site: Statistics(needs, count) for site, needs in wanted.items()}
        for stage in self._stages:
            entries = [self._entries[m.use] for m in (*stage.products, *stage.again)]
            if not (shared := {e.site: e for e in entries if e.site in wanted}):
                continue
            values = zip(stream.advance(stage.value), self._data.kept, strict=True)
            for at, (x, kept) in enumerate(values):
                for site, entry in shared.items():
                    weight = self._weight(stage.value, at)
                    found[site].add(at, as_quantized(x, entry.activation), x, kept, weight)
        return {site: _finite(statistics.result(), site) for site, statistics in found.items()}

    def _weigh(self) -> None:
        """Measure what errors cost: of rows of each stage's value, and of some sites' outputs."""
        left = [s for s in self._stages if any(map(self._measures, (*s.products, *s.again)))]
        stages = left if self._weighed else []
        products = {
            m.node: self._entries[m.use].site
            for s in self._stages
            for m in (*s.products, *s.again)
            if Statistic.OUTPUT_HESSIAN in _needs(self._entries[m.use])
        }
        products = {node: site for node, site in products.items() if site not in self._codes}
        asked = stages if self._data.weights is None else ()
        rows = {m.node for s in asked for m in (*s.products, *s.again)}
        found = costs(self._program, rows, products, self._data.batches, SEED, self._data.kept)
        if missing := set(products.values()) - found.sums.keys():
            raise BadInput(
                f"{min(missing)}: nothing floating that the model returns depends on it, so what "
                "its errors cost is not known\n  use a rounding that weighs inputs alone"
            )
        for site, value in found.sums.items():
            _finite({Statistic.OUTPUT_HESSIAN: value}, site)
        self._outputs = dict(found.sums)
        known = self._data.weights if self._weighed else None
        self._weights = token_weights(stages, found.rows) if known is None else known

    def _measures(self, matmul: Matmul) -> bool:
        entry = self._entries[matmul.use]
        return entry.site not in self._codes and bool(_of_inputs(entry))

    def _weight(self, value: str, batch: int) -> Tensor | None:
        of = self._weights.get(value)
        return None if of is None else of[batch]

    def _stream(self, *, quantized: bool) -> Stream:
        batches = self._data.batches
        if not quantized:
            return Stream(self._program, batches, lambda _: None, {})
        activations = {u: e.activation for u, e in self._entries.items() if e.activation}
        return Stream(self._program, batches, self._replaced, activations)

    def _replaced(self, use: str) -> Tensor | None:
        """A quantized weight as numbers, in the type and layout that the graph reads."""
        if (codes := self._codes.get(self._program.site(use))) is None:
            return None
        like = read.dtype(self._program.node(use))
        assert like is not None
        value_nk = codes.dequantize(like)
        return value_nk.mT if self._reads.get(use, 1) == 0 else value_nk

    def _round_tables(self, tables: Mapping[str, Quantized]) -> None:
        for use in find_tables(self._program):
            entry = tables.get(self._program.site(use))
            if entry is not None and entry.site not in self._codes:
                parts = pieces.pieces(self._program.weights[use], self._program.sources)
                codes = round_parts(ROUNDINGS[entry.rounding], parts, entry.weight, {})
                self._codes.put(entry.site, codes)


def _needs(entry: Quantized) -> frozenset[Statistic]:
    return ROUNDINGS[entry.rounding].needs


def _of_inputs(entry: Quantized) -> frozenset[Statistic]:
    """What is measured where a value is read; the rest is measured of the whole model before."""
    return _needs(entry) - {Statistic.OUTPUT_HESSIAN}


def _finite(stats: Stats, where: str) -> Stats:
    for statistic, value in stats.items():
        if not bool(value.isfinite().all()):
            raise BadInput(
                f"calibration: {statistic.name} of the values at {where} is not finite\n"
                "  look for NaN or infinity in the data, or calibrate the model in float32"
            )
    return stats
