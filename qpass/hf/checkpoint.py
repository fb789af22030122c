"""How a model is saved to a directory and read back, whether it comes from transformers or not."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from qpass.errors import BadInput, expect_instance
from qpass.hf.pretrained import load_model
from qpass.targets import checkpoint
from qpass.targets.checkpoint import SECTION
from qpass.targets.fixed import described, made_with

# what a model's directory holds beside the model
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def save(model: nn.Module, where: str | Path) -> None:
    """Write `model` to the directory `where`; the same model gives the same bytes.

    Tokenizer files are copied when a transformers model was read from a directory. Raises
    `BadInput` where the directory holds anything but an earlier save.
    """
    expect_instance(nn.Module, "model", model, "a torch.nn.Module")
    where = _path(where)
    with described():
        state = model.state_dict()
    config: dict[str, Any] = {SECTION: checkpoint.section(model)}
    files: dict[str, bytes] = {}
    if _is_pretrained(model):
        config = {**_config(model), **config}
        files = _companions(model)
        tied = set(cast("Any", model).all_tied_weights_keys)
        state = {key: tensor for key, tensor in state.items() if key not in tied}
        aliases = dict[str, str]()
    else:
        aliases = _aliases(model, state)
        config["aliases"] = aliases
    try:
        stored, make = _apart(state, aliases), functools.partial(made_with, model)
        checkpoint.write(where, config, stored, files, make=make)
    except OSError as error:
        raise BadInput(f"{where} cannot be written: {error.strerror or error}") from error


def load(where: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote to `where`, in evaluation mode.

    A model that is not of transformers is read into `model`: a fresh one, as it was built before
    qpass changed it. Raises `BadInput` where a file is missing, damaged or of a newer format.
    """
    where = _path(where)
    config = checkpoint.read_config(where)
    table = checkpoint.read_section(config, where)
    if model is not None:
        expect_instance(nn.Module, "model", model, "a torch.nn.Module to fill")
        _fill(model, where, config, table)
        return model.eval()
    if "architectures" not in config:
        raise BadInput(
            f"{where} holds the state of a plain module; "
            "pass a fresh one to fill: qpass.load(where, model=MyModel())"
        )
    return load_model(where)


def _path(where: str | Path) -> Path:
    expect_instance((str, Path), "where", where, "the path of a directory")
    return Path(where)


def _fill(
    model: nn.Module, where: Path, config: Mapping[str, object], table: Mapping[str, object]
) -> None:
    tensors = checkpoint.read_tensors(where)
    aliases = cast("dict[str, str]", config.get("aliases", {}))
    for name, source in aliases.items():
        if source in tensors:
            tensors[name] = tensors[source]
    checkpoint.prepare(model, table)
    if table["untied"]:
        _untie(model)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise BadInput(f"{where} does not fit the model: {error}") from error
    for name, source in aliases.items():
        _tie(model, name, source)
    checkpoint.complete(model, table)


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Let two names share a parameter, as they did when it was saved."""
    shared = dict(model.named_parameters()).get(source)
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if shared is not None and attribute in module._parameters:
        module._parameters[attribute] = shared


def _untie(model: nn.Module) -> None:
    """Give modules that share a parameter one each, which the checkpoint then fills."""
    seen = set[nn.Parameter]()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                fresh = nn.Parameter(parameter.detach(), parameter.requires_grad)
                module.register_parameter(name, fresh)
            seen.add(parameter)


def _is_pretrained(model: nn.Module) -> bool:
    # a model of transformers cannot exist before transformers has been imported
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _config(model: nn.Module) -> dict[str, Any]:
    owner = cast("Any", model)
    found = json.loads(owner.config.to_json_string(use_diff=True))
    found["architectures"] = [type(model).__name__]
    found["dtype"] = str(owner.dtype).removeprefix("torch.")
    return found


def _companions(model: nn.Module) -> dict[str, bytes]:
    owner = cast("Any", model)
    files: dict[str, bytes] = {}
    if owner.can_generate():
        text = owner.generation_config.to_json_string(use_diff=True)
        files["generation_config.json"] = text.encode()
    source = Path(owner.config._name_or_path or "")
    if owner.config._name_or_path and source.is_dir():
        files |= {
            name: (source / name).read_bytes() for name in _COMPANIONS if (source / name).is_file()
        }
    return files


def _aliases(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor that is another one again: its name, and that of the one that is stored."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(state):
        tensor = state[name]
        if tensor.numel() == 0:
            continue
        key: tuple[object, ...]
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.is_meta:
            path, _, own = name.rpartition(".")
            key = (id(model.get_submodule(path)), own)
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def _apart(state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors to store, none of which shares memory with another."""
    seen = set[int]()
    found: dict[str, Tensor] = {}
    for name in sorted(state.keys() - aliases.keys()):
        tensor = state[name].detach()
        if tensor.is_meta:
            found[name] = tensor
            continue
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return found
