"""Which layers a checkpoint holds, and what stands in their places until its tensors are there."""

# N out_features, K in_features, G groups of a row

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.plan.plan import read_online, transform_table
from qpass.quantize.containers import Held, as_lines, hold
from qpass.rotations import Kronecker, Transform
from qpass.targets.channels import TurnedChannels, show_settings
from qpass.targets.holding import Holding, holdings, let_hold
from qpass.targets.layers import QuantizedLinear, RotatedLinear, integers
from qpass.targets.numbers import NUMBERS, by_name, numbers_of
from qpass.targets.tables import QuantizedEmbedding
from qpass.targets.tensors import LINES, Shapes, from_lines, from_tensors, line_shapes, shapes
from qpass.targets.turned import Turned

# layers that hold another module
_AROUND = ("turned", "channels")

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def float_type(name: str) -> torch.dtype:
    """The type a checkpoint calls `name`."""
    if name not in _DTYPES:
        raise BadInput(f"{name!r} is no type that a model computes in")
    return _DTYPES[name]


@final
@dataclass(frozen=True, slots=True)
class Form:
    """What decides a layer but for the values of its tensors.

    `bits` is None for a float layer; `groups` counts the scales of a row beside its own (0: none).
    `bias` names the type of the bias, `after` is a transform that runs behind the layer. `spec` is
    that of the weight where the fields before do not say it; `activation` that of rows which do not
    become integers. A module that holds a transform has it in front of its weight `name`, whose
    `axis` it turned; in front of a convolution that axis is that of the channels it reads, `rows`
    in all and `columns` to a group. `layout` is how the codes of a linear layer lie: in lines, or
    (None) row by row.
    """

    path: str
    kind: str
    rows: int
    columns: int
    dtype: str
    bits: int | None = None
    groups: int = 0
    offsets: bool = False
    bias: str | None = None
    activation_bits: int | None = None
    transform: Transform | Kronecker | None = None
    after: Transform | None = None
    transposed: bool = False
    padding_idx: int | None = None
    spec: QuantSpec | None = None
    activation: QuantSpec | None = None
    name: str | None = None
    axis: int | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "rotated", "embedding", "held", *_AROUND):
            raise BadInput(f"{self.path}: no layer of kind {self.kind!r}; update qpass to read it")
        for name in filter(None, (self.dtype, self.bias)):
            float_type(name)
        if self.layout is not None and (self.layout != LINES or not as_lines(self.weight)):
            raise BadInput(
                f"{self.path}: no {self.weight.format} codes lie in {self.layout!r}; "
                "update qpass to read it"
            )

    def tensors(self) -> Shapes:
        """The shape and type of each tensor that the checkpoint has for the layer."""
        n, k = self.rows, self.columns
        if self.kind in ("held", *_AROUND):
            # it holds another module, and what it computes follows from its transforms
            return {}
        if self.kind == "embedding":
            return {"codes": ((n, k), torch.int8), "row_scales": ((n,), torch.float32)}
        bias: Shapes = {} if self.bias is None else {"bias": ((n,), _DTYPES[self.bias])}
        if self.kind == "rotated":
            return {"rotated": ((n, k), _DTYPES[self.dtype]), **bias}
        weight = shapes if self.layout is None else line_shapes
        return {**weight(self.weight, n, k), **numbers_of(self.transform), **bias}

    @property
    def weight(self) -> QuantSpec:
        """What the codes of a linear layer mean."""
        return self.spec or integers(
            self.bits or 8, self.groups, self.columns, offsets=self.offsets
        )

    def table(self) -> dict[str, object]:
        """A table that `read` takes back."""
        found = dataclasses.asdict(self)
        for name, spec in (("spec", self.spec), ("activation", self.activation)):
            found[name] = None if spec is None else spec.table()
        for name, transform in (("transform", self.transform), ("after", self.after)):
            found[name] = None if transform is None else transform_table(transform)
        for name in ("after", "spec", "activation", "name", "axis", "layout"):
            if found[name] is None:
                # checkpoints without such layers are written as they were before there were any
                del found[name]
        return found

    @staticmethod
    def read(table: Mapping[str, object]) -> Form:
        """The form that `table` wrote."""
        fields: dict[str, Any] = dict(table)
        try:
            for name in ("transform", "after"):
                if fields.get(name) is not None:
                    fields[name] = read_online(fields[name])
            for name in ("spec", "activation"):
                if fields.get(name) is not None:
                    fields[name] = QuantSpec.read(fields[name])
            return Form(**fields)
        except TypeError as error:
            raise BadInput(f"a layer of the checkpoint is not understood: {error}") from error


@final
class Blank(nn.Module):
    """The tensors of one layer in the form of checkpoints, to be filled by whoever reads them."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        for name, (shape, dtype) in form.tensors().items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            if form.kind == "rotated":
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)

        if "bias" not in form.tensors():
            self.register_parameter("bias", None)

    # models that initialise what a checkpoint lacks look for all this in their parts

    @property
    def in_features(self) -> int:
        """As the layer has it, and so have the next three."""
        return self.form.columns

    @property
    def out_features(self) -> int:
        return self.form.rows

    @property
    def num_embeddings(self) -> int:
        return self.form.rows

    @property
    def embedding_dim(self) -> int:
        return self.form.columns

    @property
    def padding_idx(self) -> int | None:
        return self.form.padding_idx

    @property
    def weight(self) -> Tensor:
        """The shape of the weight: what is written to it is nowhere."""
        form = self.form
        shape = (form.columns, form.rows) if form.transposed else (form.rows, form.columns)
        empty = torch.empty(shape, device="meta")
        # what transformers asks for before it writes to a tensor
        vars(empty)["_is_hf_initialized"] = True
        return empty

    def layer(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The layer with these tensors, computing in `dtype` (None: as it was saved)."""
        form = self.form
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        if empty := [name for name, tensor in held.items() if tensor.is_meta]:
            raise BadInput(f"{form.path}: the checkpoint has no {', '.join(empty)}")
        for name, (shape, _) in form.tensors().items():
            if tuple(held[name].shape) != shape:
                found = tuple(held[name].shape)
                raise BadInput(f"{form.path}.{name}: has shape {found}, expected {shape}")
        dtype = dtype or _DTYPES[form.dtype]
        if form.kind == "embedding":
            codes, scales = held["codes"], held["row_scales"]
            return QuantizedEmbedding(codes, scales, dtype=dtype, padding_idx=form.padding_idx)
        if form.kind == "rotated":
            assert form.transform is not None
            return RotatedLinear(
                held["rotated"],
                held.get("bias"),
                transform=by_name(form.transform, form.path),
                transposed=form.transposed,
            )
        transform = form.transform
        if isinstance(transform, Kronecker):
            transform = transform.filled(held[NUMBERS])
        if form.layout is None:
            weight: Held = hold(from_tensors(form.weight, form.columns, held))
        else:
            weight = from_lines(form.weight, form.rows, form.columns, held)
        return QuantizedLinear(
            weight,
            held.get("bias"),
            dtype=dtype,
            activation_bits=form.activation_bits,
            activation=form.activation,
            transform=transform,
            transposed=form.transposed,
            spec=form.weight,
        )


@final
class BlankTurned(nn.Module):
    """A module that will have another around it, once its own tensors are there."""

    def __init__(self, form: Form, inner: nn.Module) -> None:
        super().__init__()
        self.form = form
        self.inner = inner
        show_settings(self, inner)

    @property
    def weight(self) -> object:
        """That of the module, and so is the next: models look for both in their parts."""
        return getattr(self.inner, "weight", None)

    @property
    def bias(self) -> object:
        return getattr(self.inner, "bias", None)

    def layer(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The two, turning in `dtype` (None: as it was saved)."""
        form = self.form
        if form.kind == "channels":
            assert form.transform is not None
            assert form.axis is not None
            return TurnedChannels(
                self.inner,
                by_name(form.transform, form.path),
                dtype or _DTYPES[form.dtype],
                axis=form.axis,
                groups=form.rows // form.columns,
                transposed=form.transposed,
            )
        before, after = (
            None if turn is None else by_name(turn, form.path)
            for turn in (form.transform, form.after)
        )
        return Turned(self.inner, before, after, dtype or _DTYPES[form.dtype])


def describe(model: nn.Module) -> tuple[Form, ...]:
    """The form of every layer that qpass put into `model`, by path."""
    found = [_form(path, module) for path, module in model.named_modules()]
    found += [_held(model, holding) for holding in holdings(model)]
    forms = (form for form in found if form is not None)
    return tuple(sorted(forms, key=lambda form: (form.path, form.name or "")))


def place(model: nn.Module, forms: Iterable[Form]) -> None:
    """Put a blank wherever the checkpoint has a layer of its own."""
    for form in forms:
        inner = _at(model, form.path)
        if form.kind == "held":
            # its tensors are the module's own
            continue
        _put(model, form.path, BlankTurned(form, inner) if form.kind in _AROUND else Blank(form))


def finish(model: nn.Module, forms: Iterable[Form], dtype: torch.dtype | None = None) -> None:
    """Turn every blank, now filled, into its layer, and let modules hold transforms again."""
    blanks = [(p, m) for p, m in model.named_modules() if isinstance(m, Blank | BlankTurned)]
    for path, blank in blanks:
        _put(model, path, blank.layer(dtype))
    for form in forms:
        if form.kind == "held":
            let_hold(model, _holding(model, form))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(_at(model, path).training)
    _at(model, parent)._modules[name] = module


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise BadInput(
            f"the checkpoint has a layer {path}, the model has none; is it another model?"
        ) from error


def _form(path: str, module: nn.Module) -> Form | None:
    if isinstance(module, QuantizedEmbedding):
        dtype, padding = _name(module.dtype), module.padding_idx
        rows, columns = module.num_embeddings, module.embedding_dim
        return Form(path, "embedding", rows, columns, dtype, bits=8, padding_idx=padding)
    if isinstance(module, QuantizedLinear):
        spec = module.spec
        form = Form(
            path,
            "linear",
            module.out_features,
            module.in_features,
            _name(module.dtype),
            bits=spec.codes.bits,
            groups=0 if module.group_scales is None else module.groups,
            offsets=module.group_offsets is not None,
            bias=None if module.bias is None else _name(module.bias.dtype),
            activation_bits=module.activation_bits,
            transform=None if module.online is None else module.online.transform,
            transposed=module.transposed,
            activation=module.activation,
            layout=LINES if as_lines(spec) else None,
        )
        plain = integers(module.bits, form.groups, form.columns, offsets=form.offsets)
        return form if spec == plain else dataclasses.replace(form, spec=spec)
    if isinstance(module, RotatedLinear):
        return Form(
            path,
            "rotated",
            module.out_features,
            module.in_features,
            _name(module.rotated.dtype),
            bias=None if module.bias is None else _name(module.bias.dtype),
            transform=module.online.transform,
            transposed=module.transposed,
        )
    if isinstance(module, Turned):
        before, after = module.transforms
        rows, columns = (0 if turn is None else turn.width for turn in (after, before))
        dtype = _name(module.dtype)
        return Form(path, "turned", rows, columns, dtype, transform=before, after=after)
    if isinstance(module, TurnedChannels):
        width, dtype = module.transform.width, _name(module.dtype)
        return Form(
            path,
            "channels",
            module.split * width,
            width,
            dtype,
            transform=module.transform,
            transposed=module.transposed,
            axis=module.axis,
        )
    return None


def _holding(model: nn.Module, form: Form) -> Holding:
    name, axis, transform = form.name, form.axis, form.transform
    weight = None if name is None else _at(model, form.path)._parameters.get(name)
    if name is None or axis is None or transform is None or weight is None:
        raise BadInput(
            f"the checkpoint changed {form.path}.{name}, the model has none; is it another model?"
        )
    if not 0 <= axis < weight.dim() or weight.shape[axis] != transform.width:
        raise BadInput(
            f"{form.path}.{name}: has shape {tuple(weight.shape)}, which {transform} does not fit"
        )
    return Holding(form.path, name, axis, by_name(transform, form.path))


def _held(model: nn.Module, holding: Holding) -> Form:
    weight = model.get_submodule(holding.path)._parameters[holding.name]
    assert weight is not None
    width = holding.transform.width
    return Form(
        holding.path,
        "held",
        weight.numel() // width,
        width,
        _name(weight.dtype),
        transform=holding.transform,
        name=holding.name,
        axis=holding.axis,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
