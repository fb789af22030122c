"""`python -m tests.accuracy.ablation`: what each rounding and each refinement gains, as a table.

Two layers of the language model are quantized with each, and compared with themselves in float on
text of other years. Results are kept, so that a run goes on where it was stopped; the table is
written into the README of the roundings.
"""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import qpass
from qpass.hf.pretrained import load_model
from qpass.plan import Recipe
from qpass.plan.refiner import REFINERS
from qpass.rounding import ROUNDINGS
from tests.accuracy import grid, language
from tests.data.fetch import MODEL
from tests.results import ROOT, Results

README = ROOT / "qpass/rounding/README.md"
BEGIN, END = "<!-- ablation -->\n", "<!-- /ablation -->\n"
STORE = ROOT / ".data" / "ablation.jsonl"
SETTING = "W3A16 g64"
LAYERS = 2
LEARNED, UNSEEN, LENGTH = 16, 8, 256
COLUMNS = ("method", "what it is", f"relative squared error, {SETTING}")


@dataclass(frozen=True)
class Line:
    """A rounding, or a refinement of what the default rounding gives."""

    name: str
    rounding: str
    refine: str
    about: str

    def measured(self) -> float:
        fields = grid.recipe(SETTING, "rounding", 0).table()
        recipe = Recipe.read({**fields, "rounding": self.rounding, "refine": self.refine})
        model, reference = part(), part()
        qpass.quantize(model, recipe, calibration=windows(language.calibration(LEARNED), LEARNED))
        lost = wanted = 0.0
        with torch.no_grad():
            for x in windows(language.evaluation(1), UNSEEN):
                got, want = (m(input_ids=x).last_hidden_state for m in (model, reference))
                lost += float((got - want).square().sum())
                wanted += float(want.square().sum())
        return lost / wanted


def lines() -> list[Line]:
    """Every method there is, by its kind and its name, which its file says in one sentence."""
    roundings = [Line(r.name, r.name, "off", _about(r)) for r in ROUNDINGS]
    refined = [Line(f"auto, {r.name}", "auto", r.name, _about(r)) for r in REFINERS]
    return [*sorted(roundings, key=lambda x: x.name), *sorted(refined, key=lambda x: x.name)]


def part() -> nn.Module:
    """The first layers of the model, without its head."""
    model = load_model(MODEL).float().eval().model
    model.layers = model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    return model


def windows(batches: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """Some windows, spread over all of them, one to a batch."""
    every = torch.cat(batches)[:, :LENGTH]
    at = torch.linspace(0, len(every) - 1, count).round().long()
    return list(every[at].split(1))


def table(found: dict[str, float]) -> str:
    """A line for each method, a dash where it has not been measured."""
    numbers = {name: f"{error:.4f}" for name, error in found.items()}
    rows = [(f"`{line.name}`", line.about, numbers.get(line.name, "-")) for line in lines()]
    every = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in every)


def write(found: dict[str, float], path: Path = README) -> None:
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}{table(found)}{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure what this code has not measured yet, then write all of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy.ablation", description=__doc__)
    parser.add_argument("--stale", action="store_true", help="results of other code count too")
    given = parser.parse_args()
    store = Results(STORE, Path(__file__))
    found = {name: float(str(r["error"])) for name, r in store.read(stale=given.stale).items()}
    for line in lines():
        if line.name not in found:
            start = time.monotonic()
            found[line.name] = line.measured()
            store.add(line.name, {"error": found[line.name]})
            taken = time.monotonic() - start
            print(f"{line.name}: {found[line.name]:.4f}, {taken:.0f} s", flush=True)  # noqa: T201
    write(found)


def _about(method: object) -> str:
    text = importlib.import_module(type(method).__module__).__doc__ or ""
    return text.splitlines()[0].removesuffix(".")


if __name__ == "__main__":
    main()
