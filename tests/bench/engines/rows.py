"""What is measured: engines with kinds of weights, and how they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tests.bench.engines.process import Process
from tests.bench.engines.says import Lost


@dataclass(frozen=True)
class Case:
    """Tokens of a prompt whose reading is timed, and of one behind which tokens are written."""

    name: str
    prompt: int
    context: int
    batch: int = 1

    def of(self, model: str) -> str:
        """What results on a model are kept under."""
        return f"{model} {self.name}".rstrip()


# every engine, then the best few
FIRST = Case("", prompt=512, context=128)
FURTHER = (
    Case("after 1900 tokens", prompt=1900, context=1900),
    Case("8 at once", prompt=128, context=128, batch=8),
)

# engine -> variants, best known first; qpass's rows run in the environment of this checkout
ROWS = {
    "qpass": ("w4a8", "w8a8"),
    "torch": ("bfloat16",),
    "onnxruntime": ("int4 level 4", "int8 dynamic"),
    "openvino": ("int4", "int8"),
    "llamacpp": ("Q4_0", "Q8_0"),
    "torchao": ("int8 dynamic",),
}
EIGHT_BITS = ("w8a8", "int8 dynamic", "int8", "Q8_0")


@dataclass
class Row:
    """One engine with one kind of weights, and what came of it."""

    engine: str
    variant: str
    process: Process | None = None
    decode: list[float] = field(default_factory=list)  # seconds for a token of every sequence
    prefill: list[float] = field(default_factory=list)  # seconds for all prompts
    lost: Lost | None = None
    writes: bool = True  # what it says token by token can be trusted
    megabytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.engine} {self.variant}"

    def result(self, case: Case) -> dict[str, object]:
        """Tokens a second of all sequences together, and what else was seen."""
        return {
            "decode": [case.batch / s for s in self.decode],
            "prefill": [case.batch * case.prompt / s for s in self.prefill],
            "first": self.prefill,
            "lost": None if self.lost is None else asdict(self.lost),
            "megabytes": self.megabytes,
            "load": self.process.load if self.process else None,
        }


Result = Mapping[str, object]


def names(model: str, case: Case) -> list[str]:
    """What results of rows are kept under, in the order of tables."""
    rows = (Row(engine, variant) for engine, several in ROWS.items() for variant in several)
    return [f"{case.of(model)}, {row.name}" for row in rows]
