"""What models of transformers call their ways in and out; by name, so nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

# arguments, and fields of configs, that ask for outputs of parts of the model
_MORE = "output_"
# whose hooks pick such outputs up
_COLLECTORS = "transformers.utils.output_capturing"
# the method that gives embeddings another number of rows
RESIZE = "resize_token_embeddings"


def entrances(model: nn.Module) -> dict[str, nn.Module]:
    """The keywords that stand for what a part of the model returns, and those parts."""
    ways = {"inputs_embeds": _found(model, "get_input_embeddings")}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = _found(model, "get_decoder")
        ways["encoder_outputs"] = _found(model, "get_encoder")
        if decoder is not None:
            ways["decoder_inputs_embeds"] = _found(decoder, "get_input_embeddings")
    parts = set(model.modules())
    return {name: part for name, part in ways.items() if part is not None and part in parts}


def _found(model: nn.Module, method: str) -> nn.Module | None:
    ask = getattr(model, method, None)
    try:
        part: object = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):
        # the library's answer for models that have no such part
        return None
    return part if isinstance(part, nn.Module) else None


def switches(model: nn.Module) -> tuple[tuple[object, str], ...]:
    """The fields of the configs in a model that ask for more outputs."""
    configs = {id(c): c for m in model.modules() for c in _configs(vars(m).get("config"))}
    return tuple(
        (config, name) for config in configs.values() for name in dir(config) if _asks(name)
    )


def _configs(found: object) -> Iterator[object]:
    fields = getattr(found, "__dict__", None)
    if not isinstance(fields, dict):
        return
    yield found
    for part in parts_of_config(found):
        yield from _configs(part)


def parts_of_config(config: object) -> list[object]:
    """The configs inside of a config: those whose names say so, and those that its class lists."""
    listed: object = getattr(type(config), "sub_configs", {})
    names = cast("dict[str, object]", listed) if isinstance(listed, dict) else {}
    fields = cast("dict[str, object]", vars(config))
    return [part for name, part in fields.items() if name.endswith("config") or name in names]


def asks_for_more(kwargs: Mapping[str, object], fields: tuple[tuple[object, str], ...]) -> bool:
    """Whether a call, or a field of a config, wants values of parts of the model returned, too."""
    for name, value in kwargs.items():
        # 0 picks the first of several
        if _asks(name) and value is not None and value is not False:
            return True
    return any(getattr(config, name) is True for config, name in fields)


def _asks(name: str) -> bool:
    return name.startswith(_MORE)


def is_collector(hook: object) -> bool:
    """Whether a hook is the library's own, which collects outputs that a call asks for."""
    return getattr(hook, "__module__", None) == _COLLECTORS


def resizable(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that can give its embeddings another number of rows."""
    return [module for module in model.modules() if callable(getattr(module, RESIZE, None))]
