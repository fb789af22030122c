"""How a model that cannot be traced as a whole becomes a program of the parts that can."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qpass.capture.call import Captured, by_name
from qpass.errors import BadInput, CaptureFailed, first_line
from qpass.ir import Note, Owner, Program, Weight, edit

Args = tuple[object, ...]
Kwargs = dict[str, object]
Trace = Callable[[nn.Module, Args, Kwargs], Captured]
Run = Callable[[Args, Kwargs], object]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A call that a module got; calls of one `kind` can run the same graph."""

    module: nn.Module
    args: Args
    kwargs: Kwargs

    @property
    def kind(self) -> tuple[object, ...]:
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        what = tuple(
            (leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
        )
        return id(self.module), structure, what


@final
@dataclass(slots=True, eq=False)
class _Part:
    """A call whose graph was traced, and the inputs it was traced on."""

    call: _Call
    path: str
    captured: Captured

    def inputs(self, call: _Call) -> tuple[object, ...]:
        """The inputs of its program in another call of the same kind."""
        return self.captured.flatten_call(call.args, call.kwargs)


def capture_parts(
    model: nn.Module, args: Args, kwargs: Kwargs, run: Run, trace: Trace, failure: CaptureFailed
) -> tuple[Program, list[Note], Callable[[Args, Kwargs], tuple[object, ...]]]:
    """The program of all calls of submodules that can be traced, as large as they come.

    Values between the parts are inputs and outputs, so they keep their basis. Also returns notes,
    and what records the inputs of the program during a call of the model. Raises `failure` where
    nothing can be traced.
    """
    paths = {module: path for path, module in model.named_modules()}
    notes: list[Note] = []
    parts: dict[tuple[object, ...], _Part] = {}
    failed: set[nn.Module] = {model}
    while True:
        calls = _record(model, [m for m in paths if m not in failed], lambda: run(args, kwargs))
        fails: dict[nn.Module, str] = {}
        for call in calls:
            if call.kind in parts or call.module in fails:
                continue
            if not _holds_weights(call.module):
                fails[call.module] = ""
                continue
            try:
                captured = trace(call.module, call.args, call.kwargs)
            except (CaptureFailed, BadInput) as error:
                fails[call.module] = first_line(error)
                continue
            parts[call.kind] = _Part(call, paths[call.module], captured)
        if not fails:
            break
        failed |= fails.keys()
        parts = {kind: part for kind, part in parts.items() if part.call.module not in failed}
        notes += [Note(False, paths[module], why) for module, why in fails.items() if why]
    if not parts:
        raise failure
    every = list({call.kind: parts[call.kind] for call in calls}.values())
    whole = {part.call.module for part in every}
    outside = _used_outside(model, whole, lambda: run(args, kwargs))
    program = _joined(model, every, outside)
    why = f"captured in {len(every)} parts, between which nothing changes: {first_line(failure)}"
    first = tuple(part.inputs(part.call) for part in every)

    def record(args: Args, kwargs: Kwargs) -> tuple[object, ...]:
        found: dict[tuple[object, ...], _Call] = {}
        for call in _record(model, whole, lambda: run(args, kwargs)):
            found.setdefault(call.kind, call)
        flat: list[object] = []
        for part, known in zip(every, first, strict=True):
            # a part that this call of the model does not reach has the inputs of the first
            call = found.get(part.call.kind)
            flat += known if call is None else part.inputs(call)
        return tuple(flat)

    return program, [Note(False, "the model", why), *notes, *_notes(every)], record


def _holds_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Watch:
    """Hooks that tell `see` of the outermost calls of some modules, and which are `running`."""

    see: Callable[[_Call], None]
    running: list[nn.Module] = field(default_factory=list[nn.Module])

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if not self.running:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            self.see(_Call(module, *by_name(bound, {})))
        self.running.append(module)

    def leave(self, module: nn.Module, args: Args, result: object) -> None:
        self.running.pop()


def is_recorder(hook: object) -> bool:
    """Whether a hook records outermost calls, to trace them."""
    return isinstance(getattr(hook, "__self__", None), _Watch)


def looks_away(hook: object) -> bool:
    """Whether a hook records outermost calls and one is under way: it looks at no values now."""
    watch = getattr(hook, "__self__", None)
    return isinstance(watch, _Watch) and bool(watch.running)


def _notes(parts: Iterable[_Part]) -> Iterator[Note]:
    for part in parts:
        for note in part.captured.notes:
            yield replace(note, where=_inside(part.path, note.where))


def _record(
    model: nn.Module, watched: Iterable[nn.Module], run: Callable[[], object]
) -> list[_Call]:
    """The calls of `watched` modules that are not made inside of one, in order."""
    calls: list[_Call] = []
    with _watching(watched, calls.append):
        run()
    return calls


@contextmanager
def _watching(
    watched: Iterable[nn.Module], see: Callable[[_Call], None]
) -> Generator[list[nn.Module]]:
    """Tell `see` of outermost calls; gives the stack of `watched` modules that are running."""
    watch = _Watch(see)
    handles: list[Any] = []
    for module in watched:
        handles.append(
            module.register_forward_pre_hook(watch.enter, prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        yield watch.running
    finally:
        for handle in handles:
            handle.remove()


@final
class _Uses(TorchFunctionMode):
    """Collects which of some tensors operators read while no part is running."""

    def __init__(self, names: Mapping[int, str], running: Sequence[nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names, self._running = names, running

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not self._running and any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):
            read = (self._names.get(id(x)) for x in pytree.tree_leaves((args, kwargs)))
            self.found |= {name for name in read if name is not None}
        return result


def _used_outside(
    model: nn.Module, parts: set[nn.Module], run: Callable[[], object]
) -> frozenset[str]:
    """The names of stored tensors that code outside of the parts computes with."""
    with _watching(parts, lambda _: None) as running:
        uses = _Uses({id(tensor): name for name, tensor in _stored(model).items()}, running)
        with uses:
            run()
    return frozenset(uses.found)


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor of the model, under the first of its names."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return dict(found)


@dataclass(slots=True, eq=False)
class _Names:
    """What parts call their modules and tensors, and what the model calls them."""

    model: nn.Module
    modules: dict[nn.Module, str] = field(init=False)
    tensors: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = {module: path for path, module in self.model.named_modules()}
        self.tensors = {id(tensor): name for name, tensor in _stored(self.model).items()}

    def module(self, part: _Part, path: str) -> str:
        return self.modules[part.call.module.get_submodule(path)]

    def source(self, part: _Part, name: str) -> str:
        tensor = part.captured.program.sources[name]
        return self.tensors.get(id(tensor)) or _inside(part.path, name)


def _joined(model: nn.Module, parts: Sequence[_Part], outside: frozenset[str]) -> Program:
    """One program that runs every part on inputs of its own, and returns all they return."""
    names, stored = _Names(model), _stored(model)
    graph = fx.Graph()
    weights: dict[str, Weight] = {}
    owners: dict[str, Owner] = {}
    sources: dict[str, Tensor] = {}
    rigid: set[str] = set()
    fixed: set[str] = set()
    inner: set[str] = set()
    copies: list[dict[fx.Node, fx.Node]] = []
    for part in parts:
        program = part.captured.program
        modules = {path: names.module(part, path) for path, _ in part.call.module.named_modules()}
        inner |= set(modules.values())
        rigid |= {modules[path] for path in program.rigid}
        fixed |= {names.source(part, source) for source in program.fixed}
        edit.rename_modules(program.graph, modules)
        copied = {n: graph.node_copy(n) for n in program.graph.nodes if n.op == "placeholder"}
        copies.append(copied)
        for use, weight in program.weights.items():
            name = copied[program.node(use)].name
            if weight.source is not None:
                source = names.source(part, weight.source)
                sources[source] = program.sources[weight.source]
                weight = replace(weight, source=source)
            weights[name] = weight
            if (owner := program.owners.get(use)) is not None:
                owners[name] = replace(owner, module=modules[owner.module])
    returned: list[fx.Node] = []
    for part, copied in zip(parts, copies, strict=True):
        results = graph.graph_copy(part.captured.program.graph, cast("dict[fx.Node, Any]", copied))
        leaves = pytree.tree_leaves(results)
        returned += [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    elsewhere = frozenset(path for path, _ in model.named_modules() if path not in inner)
    joined = Program(graph, weights, sources, owners, frozenset(rigid), elsewhere=elsewhere)
    joined.fixed = frozenset(fixed)
    graph.output(tuple(returned))
    for name in sorted(outside & sources.keys()):
        # what reads it is not in the graph, so this use of it may not change
        path, _, attribute = name.rpartition(".")
        like = _like(joined, name, stored[name])
        use = edit.add_weight(joined, "outside", Weight(name), like, Owner(path, attribute))
        returned.append(use)
    graph.output_node().args = (tuple(returned),)
    joined.lint()
    return joined


def _like(program: Program, name: str, tensor: Tensor) -> Tensor:
    return edit.fake_like(program, tuple(tensor.shape), tensor.dtype)


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
