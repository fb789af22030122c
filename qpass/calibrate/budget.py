"""Whose quantization costs what: measured one site at a time, and predicted from gradients.

A site's prediction is linear in its own error, as in "Pushing the Limits of Large Language Model
Quantization via the Linearity Theorem" (2024): a coefficient of the model times the relative
squared error of what the site makes. The paper fits the coefficients to noise that it injects;
here they are those of the Fisher information. Where `g` is the gradient of the logarithm of a
token that is drawn from the predicted distribution, an error `e` of a row of a product's output,
of no preferred direction among n, adds `|g|^2 |e|^2 / 2n` to the divergence of all outputs.
"""

# m rows of a product, n output features, k input features, v vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls, find_tables
from qpass.calibrate.backward import gradients_at
from qpass.calibrate.outputs import surprise
from qpass.calibrate.stream import Stream, as_quantized
from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ir import Program, fresh, last_uses, read, run_node
from qpass.verify.calls import Text
from qpass.verify.logits import Expected, compare
from qpass.verify.scores import Budget, Estimate, Score, SiteCost, mean

# of the tokens that are drawn
SEED = 0
Advance = Callable[[int, int], None]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """What is quantized of a float program: a weight as numbers `[n, k]`, and who reads it how."""

    weight_nk: Tensor
    activation: QuantSpec | None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Flat inputs of a program for each batch, and what of each is text."""

    batches: Sequence[Sequence[object]]
    words: Sequence[Text]


def error_budget(
    program: Program,
    sites: Mapping[str, Changed],
    data: Windows,
    output: fx.Node,
    *,
    measured: bool,
    advance: Advance = lambda _at, _of: None,
) -> Budget:
    """What each of `sites` costs, in nats for each position of `output`, the logits.

    Nothing but predictions unless `measured`: that runs the program once more for each site, from
    where the site is. Memory holds the weights of the program once more.
    """
    products = _products(program, sites)
    if missing := sites.keys() - {product.site for product in products}:
        raise BadInput(f"{min(missing)}: the reference has no such weight; is it another model?")
    scores: dict[str, list[Score]] = {}
    whole: list[Score] = []
    runs = _Runs(program, sites, products, output)
    for at, (batch, words) in enumerate(zip(data.batches, data.words, strict=True)):
        steps = len(sites) if measured else 1
        own, forks = runs.forked(batch) if measured else (runs.plain(batch), iter(()))
        advance(at * steps, len(data.batches) * steps)
        expected = Expected.of(own, words)
        whole += compare(runs.whole(batch), expected)
        for done, (site, found) in enumerate(forks):
            scores.setdefault(site, []).extend(compare(found, expected))
            advance(at * steps + done, len(data.batches) * steps)
    advance(1, 1)
    errors = _errors(program, sites, products, data)
    positions = sum(score.positions for score in whole)
    predicted = _predicted(program, products, data, output, errors, positions)
    costs = tuple(
        SiteCost(site, errors[site].relative, predicted.get(site), _kl(scores.get(site)))
        for site in dict.fromkeys(product.site for product in products)
    )
    return Budget(costs, _required(_kl(whole)), _sum(list(scores.values())))


def _kl(scores: Sequence[Score] | None) -> Estimate | None:
    if not scores:
        return None
    return mean([s.divergence for s in scores], [s.positions for s in scores])


def _sum(scores: Sequence[Sequence[Score]]) -> Estimate | None:
    """The sum over sites, whose windows are the same ones."""
    if not scores:
        return None
    sums = [sum(score.divergence for score in window) for window in zip(*scores, strict=True)]
    return mean(sums, [score.positions for score in scores[0]])


def _required(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise BadInput("there is no position to compare")
    return estimate


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A node that reads a quantized weight: a product of `value`, or a table looked up by it."""

    site: str
    node: str
    use: str
    value: str
    matmul: Matmul | None


def _products(program: Program, sites: Mapping[str, Changed]) -> list[_Product]:
    found = [
        _Product(program.site(m.use), m.node, m.use, m.value, m) for m in find_matmuls(program)
    ]
    for use in find_tables(program):
        for node in program.node(use).users:
            at = read.value(node, "indices")
            found.append(_Product(program.site(use), node.name, use, at.name, None))
    order = {node.name: at for at, node in enumerate(program.graph.nodes)}
    return sorted((p for p in found if p.site in sites), key=lambda p: order[p.node])


@final
class _Runs:
    """Runs of a program with nothing, one site or everything quantized."""

    def __init__(
        self,
        program: Program,
        sites: Mapping[str, Changed],
        products: Sequence[_Product],
        output: fx.Node,
    ) -> None:
        self._program, self._sites, self._output = program, sites, output
        self._nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        self._last = last_uses(program.graph)
        self._by_node = {product.node: product for product in products}
        self._writes = any(map(read.writes, self._nodes))
        self._weights: dict[fx.Node, Tensor] = {}

    def plain(self, batch: Sequence[object]) -> Tensor:
        return self._end(self._start(batch), 0, frozenset())

    def whole(self, batch: Sequence[object]) -> Tensor:
        return self._end(self._start(batch), 0, frozenset(self._sites))

    def forked(self, batch: Sequence[object]) -> tuple[Tensor, Iterator[tuple[str, Tensor]]]:
        """The float output, and that with each site alone quantized."""
        return self.plain(batch), self._forks(batch)

    def _forks(self, batch: Sequence[object]) -> Iterator[tuple[str, Tensor]]:
        env = self._start(batch)
        seen: set[str] = set()
        for at, node in enumerate(self._nodes):
            product = self._by_node.get(node.name)
            if product is not None and product.site not in seen:
                seen.add(product.site)
                # what operators write to must not be shared
                start, first = (self._start(batch), 0) if self._writes else (dict(env), at)
                yield product.site, self._end(start, first, frozenset({product.site}))
            if not self._writes:
                self._step(node, env, frozenset())

    def _start(self, batch: Sequence[object]) -> dict[fx.Node, object]:
        return dict(zip(self._program.inputs, fresh(batch), strict=True))

    def _end(self, env: dict[fx.Node, object], first: int, changed: frozenset[str]) -> Tensor:
        for node in self._nodes[first:]:
            self._step(node, env, changed)
        return cast("Tensor", env[self._output])

    def _step(self, node: fx.Node, env: dict[fx.Node, object], changed: frozenset[str]) -> None:
        product = self._by_node.get(node.name)
        if product is not None and product.site not in changed:
            product = None

        def load(of: fx.Node) -> object:
            if product is not None and of.name == product.use:
                return _in_layout(self._sites[product.site].weight_nk, product, of)
            if self._program.weight(of) is not None:
                return self._weight(of)
            if product is not None and product.matmul is not None and of.name == product.value:
                spec = self._sites[product.site].activation
                return as_quantized(cast("Tensor", env[of]), spec)
            return env[of]

        with torch.no_grad():
            env[node] = run_node(node, load)
        for dead in self._last.get(node, ()):
            if dead is not self._output:
                env.pop(dead, None)

    def _weight(self, node: fx.Node) -> Tensor:
        if node not in self._weights:
            self._weights[node] = self._program.value(node)
        return self._weights[node]


def _in_layout(weight_nk: Tensor, product: _Product, use: fx.Node) -> Tensor:
    dtype = read.dtype(use)
    assert dtype is not None
    value = weight_nk.to(dtype)
    return value.mT if product.matmul is not None and product.matmul.reads == 0 else value


@final
@dataclass(slots=True, eq=False)
class _Error:
    """Squares of a site's error and of what it makes, and the error of each row by product."""

    lost: float
    made: float
    rows: dict[str, list[Tensor]]

    @property
    def relative(self) -> float:
        return self.lost / self.made if self.made > 0 else 0.0


def _errors(
    program: Program,
    sites: Mapping[str, Changed],
    products: Sequence[_Product],
    data: Windows,
) -> dict[str, _Error]:
    """How far each product is from the float one, on the float model's values."""
    stream = Stream(program, data.batches, lambda _: None, {})
    found: dict[str, _Error] = {}
    for product in products:
        changed = sites[product.site]
        error = found.setdefault(product.site, _Error(0.0, 0.0, {}))
        weight = program.value(program.node(product.use))
        weight_nk = weight if product.matmul is None or product.matmul.reads == 1 else weight.mT
        for x, words in zip(stream.advance(product.value), data.words, strict=True):
            if product.matmul is None:
                made, got = weight_nk[x].float(), changed.weight_nk[x].float()
            else:
                made = x.float() @ weight_nk.float().mT
                got = as_quantized(x, changed.activation).float() @ changed.weight_nk.float().mT
            lost = (got - made).square().sum(-1)
            size = made.square().sum(-1)
            error.rows.setdefault(product.node, []).append(lost.reshape(-1))
            real = words.real
            if real is not None and real.shape == lost.shape:
                lost, size = lost[real], size[real]
            error.lost += float(lost.double().sum())
            error.made += float(size.double().sum())
    return found


def _predicted(
    program: Program,
    products: Sequence[_Product],
    data: Windows,
    output: fx.Node,
    errors: Mapping[str, _Error],
    positions: int,
) -> dict[str, float]:
    """The cost of each site by the gradients of the float model; none where there are no such."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    place = program.outputs.index(output)

    def form(at: int, values: Sequence[object]) -> Tensor:
        logits, real = cast("Tensor", values[place]), data.words[at].real
        counted = logits[real] if real is not None and real.shape == logits.shape[:-1] else logits
        return -surprise(counted.float().reshape(-1, logits.shape[-1]), generator)

    site_of = {product.node: product.site for product in products}
    found: dict[str, float] = {}
    seen = dict.fromkeys(site_of, 0)
    for name, gradient in gradients_at(program, site_of.keys(), data.batches, form):
        rows_mn = gradient.reshape(-1, gradient.shape[-1]).double()
        lost_m = errors[site_of[name]].rows[name][seen[name]].double()
        seen[name] += 1
        cost = float((rows_mn.square().sum(-1) * lost_m).sum()) / rows_mn.shape[-1]
        found[site_of[name]] = found.get(site_of[name], 0.0) + cost / (2 * positions)
    return found
