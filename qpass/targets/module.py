"""How the result of the passes gets into the module itself: all of it, or nothing."""

# N out_features, K in_features

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from qpass.errors import StateError, Unsupported
from qpass.ir import Note, Owner, Program, Weight, read
from qpass.plan import Plan
from qpass.targets.doors import find_doors, folded_name, is_folded
from qpass.targets.guard import install, whole
from qpass.targets.holding import find_holdings, let_hold
from qpass.targets.record import check_float, record_of, set_record
from qpass.targets.replacing import Advance, Encode, build_layers, held, nearest, unseen
from qpass.targets.seams import build_around
from qpass.targets.stored import to_stored
from qpass.targets.ties import untie

T = TypeVar("T")


def write_back(
    model: nn.Module,
    before: Program,
    after: Program,
    plan: Plan,
    encode: Encode = nearest,
    *,
    advance: Advance = unseen,
    ties: bool = False,
) -> list[Note]:
    """Make `model` compute what `after` does, quantized as in `plan`, and note what was done.

    `advance` is told how many layers are made, and of how many.

    `before` is the program that was captured from the model. Everything is built first and put in
    place then, so that a failure leaves the model as it was. Raises `StateError` for a model that
    is quantized already, and `Unsupported` for a change that its modules cannot hold; where `ties`
    must stay, that includes one after which tied weights differ.
    """
    check_float(model)
    done = record_of(model)
    if whole(model) is not None or any(
        record_of(m).plans for m in model.modules() if m is not model
    ):
        raise StateError(
            "qpass changed a part of this model, or the model that it is a part of\n"
            "  load the float model again and change all of it at once"
        )
    notes: list[Note] = []
    layers = build_layers(model, before, after, plan, encode, notes, advance)
    around = build_around(model, before, after)
    holdings = find_holdings(model, after, layers)
    kept = _kept(after, layers)
    tensors = _build_tensors(model, before, after, kept, notes)
    folded = _build_folded(model, before, after, len(done.plans))
    generation = len(done.plans)
    doors = find_doors(
        before, after, generation=generation, paired=plan.paired, changed=plan.changed
    )
    record = replace(
        done,
        plans=(*done.plans, plan),
        quantized=bool(plan.quantized),
        untied=done.untied or _unties(model, tensors, layers),
        folded=(*done.folded, *(slot.path for slot in folded)),
        biases=(*done.biases, *(slot.path for slot in tensors if slot.new)),
        doors=(*done.doors, doors),
        touched=tuple(sorted({*done.touched, *layers, *around, *_touched(before, after)})),
    )
    if ties and record.untied and not done.untied:
        raise Unsupported(
            f"{type(model).__name__}: computes something else once its weights are not tied\n"
            "  leave its head and embedding float and unrotated; a plan that is made for it does"
        )
    with _all_or_nothing(model):
        for path, layer in layers.items():
            _swap(model, path, layer)
        for slot in (*tensors, *folded):
            slot.fill(model)
        for holding in holdings:
            let_hold(model, holding)
        # last, as from then on what a module holds lies one step further
        for path, layer in around.items():
            _swap(model, path, layer)
        if record.untied:
            untie(model)
        install(model, record.doors, record.touched)
        if record.quantized:
            # codes have no gradient; what is still float would train against a frozen remainder
            model.requires_grad_(False)
        set_record(model, record)
    notes += [
        Note(True, holding.site, f"{holding.transform.rotation} online") for holding in holdings
    ]
    return notes


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """A tensor and where in the model it belongs; `new` if the module had none there."""

    module: str
    name: str
    tensor: Tensor
    new: bool

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name

    def fill(self, model: nn.Module) -> None:
        module = model.get_submodule(self.module)
        if isinstance(self.tensor, nn.Parameter):
            module.register_parameter(self.name, self.tensor)
        else:
            module.register_buffer(self.name, self.tensor)


def _kept(after: Program, layers: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """The uses of each stored tensor that stays float."""
    replaced = set(layers)
    found: dict[tuple[str, str], list[str]] = {}
    for use in after.weights:
        owner = after.owners.get(use)
        if owner is not None and owner.module not in replaced:
            found.setdefault((owner.module, owner.attribute), []).append(use)
    return found


def _build_tensors(
    model: nn.Module,
    before: Program,
    after: Program,
    kept: dict[tuple[str, str], list[str]],
    notes: list[Note],
) -> list[_Slot]:
    _check_ownerless(before, after)
    # uses of one parameter that end equal share one again, which is how tied weights stay tied
    made: dict[tuple[int, Weight, Owner], nn.Parameter] = {}
    worst: dict[torch.dtype, float] = {}
    slots: list[_Slot] = []
    for (path, name), uses in kept.items():
        if all(after.weights[use] == before.weights.get(use) for use in uses):
            continue
        owner, weight = after.owners[uses[0]], after.weights[uses[0]]
        if any((after.owners[use], after.weights[use]) != (owner, weight) for use in uses):
            raise Unsupported(
                f"{owner.path}: is used in {len(uses)} places that need different values now\n"
                "  leave the regions it takes part in unrotated, or give each use its own parameter"
            )
        module = model.get_submodule(path)
        old = held(module).get(name)
        key = (id(old), weight, replace(owner, module="", attribute=""))
        if old is None:
            slots.append(_new_bias(module, owner, after, uses[0]))
        elif key in made:
            slots.append(_Slot(path, name, made[key], new=False))
        else:
            value = to_stored(weight.evaluate(after.sources), owner, tuple(old.shape))
            stored = value.to(old.dtype, copy=True).contiguous()
            worst[old.dtype] = max(worst.get(old.dtype, 0.0), _rounding(value, stored))
            if isinstance(old, nn.Parameter):
                stored = made[key] = nn.Parameter(stored, requires_grad=old.requires_grad)
            slots.append(_Slot(path, name, stored, new=False))
    notes += [
        Note(True, "parameters", f"{dtype} rounds them by up to {error:.1e} of the largest entry")
        for dtype, error in worst.items()
    ]
    return slots


def _check_ownerless(before: Program, after: Program) -> None:
    for use, weight in after.weights.items():
        known = before.weights.get(use)
        if known is not None and known != weight and use not in after.owners:
            raise Unsupported(
                f"{weight.source or use}: is a constant in the model's code and cannot change\n"
                "  leave the regions it takes part in unrotated"
            )


def _new_bias(module: nn.Module, owner: Owner, after: Program, use: str) -> _Slot:
    if not isinstance(module, nn.Linear) or owner.prefix:
        raise Unsupported(
            f"{owner.path}: {type(module).__name__} cannot hold a bias that it did not have\n"
            "  leave the norm before it unfolded"
        )
    value = after.weights[use].evaluate(after.sources)
    bias = nn.Parameter(value.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
    return _Slot(owner.module, owner.attribute, bias, new=True)


def _rounding(value: Tensor, stored: Tensor) -> float:
    largest = value.abs().max() if value.numel() else value.new_zeros(())
    if not float(largest) > 0:
        return 0.0
    return float((stored.double() - value).abs().max() / largest)


def _build_folded(
    model: nn.Module, before: Program, after: Program, generation: int
) -> list[_Slot]:
    """The gains and biases that norms lose: what the norms show is restored with them."""
    slots: dict[str, _Slot] = {}
    for use, weight in before.weights.items():
        if not is_folded(weight, after.weights.get(use)) or use not in after.owners:
            continue
        owner = after.owners[use]
        like = held(model.get_submodule(owner.module))[owner.attribute]
        assert like is not None
        value = weight.evaluate(before.sources).to(like.dtype, copy=True)
        slot = _Slot(owner.module, folded_name(owner, generation), value, new=True)
        slots[slot.path] = slot
    return list(slots.values())


def _touched(before: Program, after: Program) -> set[str]:
    """The modules that hold weights which changed, and those whose own code uses them."""
    changed = {use for use in after.owners if before.weights.get(use) != after.weights[use]}
    found = {after.owners[use].module for use in changed}
    for node in before.graph.nodes:
        if any(value.name in changed for value in node.all_input_nodes):
            found.add(read.module_path(node))
    return found


def _unties(model: nn.Module, tensors: Iterable[_Slot], layers: Iterable[str]) -> bool:
    """Whether modules that share a parameter stop doing so."""
    paths: dict[nn.Parameter, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(parameter, set()).add(path)
    fate: dict[str, object] = {slot.path: slot.tensor for slot in tensors}
    for layer in layers:
        for name, _ in model.get_submodule(layer).named_parameters():
            fate[f"{layer}.{name}"] = layer
    shared = [group for group in paths.values() if len(group) > 1]
    return any(len({id(fate.get(path)) for path in group}) > 1 for group in shared)


def _swap(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` wherever the module at `path` is registered."""
    old = model.get_submodule(path)
    layer.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = layer


@contextmanager
def _all_or_nothing(model: nn.Module) -> Generator[None]:
    """Undo every change of the modules when the block raises."""
    restores = [
        restore
        for module in model.modules()
        for restore in (
            # the module's own dict also has its record, its gate and its config
            _restore(vars(module)),
            _restore(module._parameters),
            _restore(module._buffers),
            _restore(module._modules),
        )
    ]
    kinds = [(module, type(module)) for module in model.modules()]
    persistence = [(m, set(m._non_persistent_buffers_set)) for m in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for restore in restores:
            restore()
        for module, kind in kinds:
            module.__class__ = kind
        for module, names in persistence:
            module._non_persistent_buffers_set = names
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        raise


def _restore(table: dict[str, T]) -> Callable[[], None]:
    """What puts the present contents back into a table."""
    contents = dict(table)

    def restore() -> None:
        table.clear()
        table.update(contents)

    return restore
