"""`python -m tests.architectures.measure TYPE`: rotate one tiny model and print one JSON line."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf

import qpass
from qpass import api
from qpass.capture import Captured, capture
from qpass.errors import CaptureFailed, QpassError
from qpass.report.inspection import Inspection
from qpass.verify.exact import largest_error
from tests.architectures.attention import unfolded_values
from tests.architectures.catalogue import Architecture, architecture
from tests.architectures.models import NoModel, Subject, outputs, subject
from tests.architectures.surface import ABSENT, REFUSED, SAME, surface

PREFIX = "@@"
# the whole in float64; a module that casts inside its norms rounds to float32 there
LIMIT, EAGER_LIMIT, FLOAT32_LIMIT = 1e-9, 2e-5, 1e-3


@dataclass
class Result:
    """What came of one model type: fractions are of the entries of the weights of products."""

    type: str
    task: str
    status: str = "ok"
    reason: str = ""
    seconds: float = 0.0
    error: float | None = None  # captured against captured again, casts widened to float64
    eager: float | None = None  # the module itself
    other: float | None = None  # the module itself, on a call of another shape
    folded: float = 0.0
    online: float = 0.0
    declined: float = 1.0
    transforms: int = 0
    stream: float = 0.0  # folded, of the weights that read something as wide as the hidden states
    values: list[str] = field(default_factory=list[str])  # V -> O could fold here and did not
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    shown: dict[str, str] = field(default_factory=dict[str, str])
    where: list[str] = field(default_factory=list[str])


def measure(of: Architecture, *, inspected: bool = True) -> Result:
    """Build, rotate, capture again and compare; every failure is a status with its reason.

    What is known of single products and what parts show is left out unless `inspected`.
    """
    result, start = Result(of.type, of.task), time.perf_counter()
    try:
        _fill(result, subject(of), inspected=inspected)
    except NoModel as error:
        result.status, result.reason = "no model", str(error)
    except CaptureFailed as error:
        result.status, result.reason = "untraceable", _said(error)
    except QpassError as error:
        result.status, result.reason = "refused", _said(error)
    except Exception as error:  # noqa: BLE001  what nobody expected is what is looked for
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/qpass/" in f.filename]
        result.status, result.reason = "crash", f"{type(error).__name__}: {_said(error)}"
        result.where = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in ours[-3:]]
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def _fill(result: Result, tiny: Subject, *, inspected: bool) -> None:
    model, call = tiny.model, tiny.first
    before = capture(model, call)
    original = copy.deepcopy(model) if inspected else None
    # what lies between parts of a model rounds as it did before, where the same inputs go in
    flat = before.flatten(call)
    expected = _widened(before, flat)
    # nothing has changed yet, so the program is the same in all three places
    with mock.patch.object(api, "capture", return_value=before):
        if inspected:
            _look(result, tiny, qpass.inspect(model, call))
        report = qpass.rotate(model, call)
    again = capture(model, call)
    result.eager = largest_error(outputs(model, call), tiny.outputs[0])
    # traced in other parts than before, the model can only be compared as a module
    alike = len(again.program.inputs) == len(flat)
    stored = largest_error(_widened(again, flat), expected) if alike else result.eager
    double = next(model.parameters()).dtype == torch.float64
    # a model that insists on float32 stores what it absorbed in float32, which rounds it
    result.error = max(report.max_error, stored) if double else report.max_error
    result.other = largest_error(outputs(model, tiny.second), tiny.outputs[1])
    result.folded, result.online, result.declined = (round(f, 4) for f in report.coverage)
    result.transforms = len(report.online)
    limit = EAGER_LIMIT if double else FLOAT32_LIMIT
    # comparisons with NaN are false, so this order refuses it
    if not result.error <= LIMIT or not (double or stored <= EAGER_LIMIT):
        result.status, result.reason = "wrong", "the program changed"
    elif not result.eager <= limit:
        result.status, result.reason = "wrong", "the module changed"
    elif not result.other <= limit:
        result.status, result.reason = "wrong", "the module changed on a call of another shape"
    elif original is not None:
        result.shown = surface(original, model, call, limit)
        if bad := {name: said for name, said in result.shown.items() if not _expected(said)}:
            raised = any(not said.startswith("moved") for said in bad.values())
            result.status = "crash" if raised else "wrong"
            result.reason = "; ".join(f"{name}: {said}" for name, said in bad.items())


def _look(result: Result, tiny: Subject, found: Inspection) -> None:
    """Fill in what is known of single products."""
    width = hidden_size(tiny.model.config)
    stream = [p for p in found.products if p.columns == width]
    size = sum(p.rows for p in stream)
    result.stream = sum(p.rows for p in stream if p.input == "folded") / size if size else 1.0
    result.values = unfolded_values(tiny, found)
    whys = [p.why.split(" (")[0][:120] for p in found.products if p.input == "declined"]
    result.reasons = dict(Counter(whys))


def hidden_size(config: hf.PretrainedConfig) -> int:
    """How wide the hidden states of the text, or of the whole, are."""
    text = config.get_text_config()
    return int(getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 0)


def _expected(said: str) -> bool:
    return said in (SAME, ABSENT) or said.startswith(REFUSED)


def _widened(captured: Captured, flat: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(captured.program.run(*flat, widen=True))


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def main() -> None:
    """Measure the type named on the command line."""
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(PREFIX + json.dumps(asdict(measure(architecture(name)))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
