"""In which ways is the model stored and run?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from torch import nn

import qpass
from examples.demo.settings import Settings
from qpass.hf.pretrained import load_model
from qpass.report import megabytes
from qpass.targets.layers import QuantizedLinear
from qpass.targets.tables import QuantizedEmbedding

# tokens of the call that is traced and verified in float64; any number shows the same graph
SAMPLE = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a recipe with its rotation (None: as it says), or only a dtype.

    `calibrated` rows are rounded on what their products read; the others as a compiled graph is,
    which has no data.
    """

    name: str
    recipe: str | None = None
    rotation: str | None = None
    dtype: torch.dtype = torch.float32
    compiler: str | None = None
    timed: bool = False
    calibrated: bool = False

    @property
    def wish(self) -> dict[str, object] | None:
        """The recipe as qpass takes it."""
        if self.recipe is None:
            return None
        rounding = "auto" if self.calibrated else "nearest"
        rotation = {} if self.rotation is None else {"rotation": self.rotation}
        return {"recipe": self.recipe, "rounding": rounding, **rotation}


REFERENCE = Row("float32", timed=True)
EXPORTED = Row("w4a16-g64", "w4a16-g64", "off")
ROWS = (
    REFERENCE,
    Row("bfloat16 + inductor", dtype=torch.bfloat16, compiler="inductor", timed=True),
    Row("w8a8", "w8a8", "off"),
    Row("w8a8 rotated", "w8a8", "on", timed=True),
    Row("w4a8", "w4a8", "off"),
    Row("w4a8 rotated", "w4a8", "on", timed=True),
    EXPORTED,
    Row("w4a16-g64 rotated", "w4a16-g64", "on"),
    Row("w4a16-g64 calibrated", "w4a16-g64", "off", calibrated=True),
    Row("w4a4", "w4a4", "off"),
    Row("w4a4 rotated", "w4a4", "on"),
    Row("w4a4 rotated, calibrated", "w4a4", "on", calibrated=True),
    Row("auto", "auto"),
)


def save(row: Row, settings: Settings, folder: Path) -> None:
    """Write a row's weights as they are stored."""
    model = settings.load(row.dtype)
    if row.wish is None:
        model.save_pretrained(folder)
        return
    samples = settings.samples()
    short = samples[:1, :SAMPLE]
    batches = samples.split(4) if row.calibrated else None
    qpass.save(qpass.quantize(model, row.wish, calibration=batches, inputs=short), folder)


def load(row: Row, folder: Path) -> hf.PreTrainedModel:
    """What `save` wrote, as it is evaluated."""
    return load_model(folder) if row.recipe is None else qpass.load(folder)


def compiled(row: Row, settings: Settings) -> hf.PreTrainedModel:
    """A row's model as it is timed: qpass too starts from the float model, in `torch.compile`."""
    model = settings.load(row.dtype)
    if row.wish is not None:
        model.compile(backend="qpass", options={"recipe": row.wish})
    elif row.compiler is not None:
        model.compile(backend=row.compiler)
    return model


def weights_size(folder: Path) -> float:
    """The weights in a folder in 10^6 bytes."""
    return megabytes(sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def ends(model: hf.PreTrainedModel) -> str:
    """How embedding and head are stored."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, nn.Embedding) and table.weight is head.weight:
        return f"{_stored(table)}, tied"
    return f"{_stored(table)}, {_stored(head)}"


def _stored(module: nn.Module) -> str:
    if isinstance(module, QuantizedLinear):
        return module.spec.format
    if isinstance(module, QuantizedEmbedding):
        return f"int{8 * module.codes.element_size()}"
    return str(module.weight.dtype).removeprefix("torch.")


def _read(module: QuantizedLinear) -> str:
    if module.activation is not None:
        return module.activation.format
    return f"{module.activation_bits}-bit" if module.activation_bits else "float"


def formats(model: hf.PreTrainedModel) -> str:
    """What the linears between embedding and head became."""
    head = model.get_output_embeddings()
    kinds = {
        f"{module.spec.codes.bits}-bit weights, {_read(module)} activations"
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and module is not head
    }
    return " and ".join(sorted(kinds)) or "no quantized linear"
