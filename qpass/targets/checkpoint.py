"""What a saved model is on disk: safetensors, a config.json, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.plan import Plan
from qpass.targets.blank import Form, describe, finish, float_type, place
from qpass.targets.changes import read_doors, write_doors
from qpass.targets.guard import install
from qpass.targets.record import FORMAT_VERSION, Record, record_of, set_record
from qpass.targets.shards import INDEX, WEIGHTS, Make, write_shards
from qpass.targets.ties import untie

METHOD = "qpass"
SECTION = "quantization_config"
CONFIG = "config.json"
# large enough that few models are split, small enough for every file system
SHARD_BYTES = 5 * 10**9

Table = dict[str, object]

_KEYS = {"quantized", "untied", "plans", "layers", "folded", "biases", "doors", "touched"}


def section(model: nn.Module) -> Table:
    """What config.json says of qpass: all that it takes to build the model, but for tensors."""
    record = record_of(model)
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "qpass_version": _version(),
        "quantized": record.quantized,
        "untied": record.untied,
        "plans": [json.loads(plan.json()) for plan in record.plans],
        "layers": [form.table() for form in describe(model)],
        "folded": {name: _described(model.get_buffer(name)) for name in record.folded},
        "biases": {name: _described(model.get_parameter(name)) for name in record.biases},
        "doors": [write_doors(doors) for doors in record.doors],
        "touched": list(record.touched),
    }


def read_section(config: Mapping[str, object], where: Path | str) -> Table:
    """The qpass section of a config; raises `BadInput` where this version cannot read one."""
    found = config.get(SECTION)
    if not isinstance(found, dict) or cast("Table", found).get("quant_method") != METHOD:
        raise BadInput(f"{where} was not saved by qpass: its {CONFIG} has no {METHOD} section")
    table = cast("Table", found)
    version = table.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise BadInput(f"{where}: format_version is {version!r}, not a positive integer")
    if version > FORMAT_VERSION:
        raise BadInput(
            f"{where} has format {version}, this qpass reads up to {FORMAT_VERSION}; update qpass"
        )
    if missing := _KEYS - table.keys():
        raise BadInput(
            f"{where}: the {METHOD} section of {CONFIG} lacks {', '.join(sorted(missing))}"
        )
    return table


def prepare(model: nn.Module, table: Mapping[str, object]) -> None:
    """Give a fresh float model the modules, buffers and parameters that the checkpoint fills."""
    if table["untied"]:
        # some configs ask for ties again whatever was written
        untie(model)
    place(model, _forms(table))
    for module, name, empty in _added(model, table, "folded"):
        module.register_buffer(name, empty)
    for module, name, empty in _added(model, table, "biases"):
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def _forms(table: Mapping[str, object]) -> list[Form]:
    return [Form.read(form) for form in cast("Sequence[Table]", table["layers"])]


def complete(
    model: nn.Module, table: Mapping[str, object], dtype: torch.dtype | None = None
) -> None:
    """Turn a prepared model whose tensors are there into what was saved."""
    finish(model, _forms(table), dtype)
    plans = tuple(Plan.read(json.dumps(plan)) for plan in cast("Sequence[Table]", table["plans"]))
    quantized = bool(table["quantized"])
    if quantized:
        model.requires_grad_(False)
    record = Record(
        plans=plans,
        quantized=quantized,
        untied=bool(table["untied"]),
        folded=tuple(cast("Table", table["folded"])),
        biases=tuple(cast("Table", table["biases"])),
        doors=tuple(read_doors(doors) for doors in cast("Sequence[Table]", table["doors"])),
        touched=tuple(cast("Sequence[str]", table["touched"])),
    )
    set_record(model, record)
    install(model, record.doors, record.touched)


def _unmade(name: str) -> Mapping[str, Tensor]:
    raise BadInput(f"{name}: is on the meta device and holds no values; load the model first")


def write(
    where: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
    make: Make = _unmade,
) -> None:
    """Write a checkpoint to `where` as a whole: until it is complete, what was there stays.

    Tensors on the meta device are those that `make` makes. A directory that holds anything but an
    earlier checkpoint is refused.
    """
    check_room(where)
    where.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{where.name}.", dir=where.parent))
    try:
        fresh.chmod(0o755)
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        write_shards(fresh, tensors, shard_bytes, make)
        names = sorted([*(path.name for path in fresh.iterdir()), CONFIG])
        table = {**cast("Table", config[SECTION]), "files": names}
        text = json.dumps({**config, SECTION: table}, indent=2, sort_keys=True, ensure_ascii=False)
        (fresh / CONFIG).write_text(text + "\n", encoding="utf-8")
        for name in names:
            # safetensors writes for its owner only
            shutil.copymode(fresh / CONFIG, fresh / name)
        _exchange(fresh, where)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_room(where: Path) -> None:
    """Raise `BadInput` unless `where` is free, or holds an earlier checkpoint and nothing else."""
    if where.exists() and not where.is_dir():
        raise BadInput(f"{where} is a file; name a directory")
    if not where.exists() or not any(where.iterdir()):
        return
    known: object = None
    if (where / CONFIG).is_file():
        found = read_config(where).get(SECTION)
        known = cast("Table", found).get("files") if isinstance(found, dict) else None
    if not isinstance(known, list):
        raise BadInput(f"{where} is not empty and holds no model saved by qpass; name another")
    if others := {path.name for path in where.iterdir()} - set(cast("list[str]", known)):
        raise BadInput(
            f"{where} also holds {', '.join(sorted(others)[:3])}, which saving would remove; "
            "move it away or name another directory"
        )


def read_config(where: Path) -> Table:
    """The config.json of a directory; raises `BadInput` where there is none."""
    path = where / CONFIG
    if not where.is_dir():
        raise BadInput(f"{where} is not a directory")
    if not path.is_file():
        raise BadInput(f"{where} has no {CONFIG}; is it a saved model?")
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no table")
    return cast("Table", found)


def read_tensors(where: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; raises `BadInput` where one of its files is not whole."""
    names = [WEIGHTS]
    if (where / INDEX).is_file():
        index = json.loads((where / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            found |= load_file(where / name)
        except FileNotFoundError as error:
            raise BadInput(f"{where} has no {name}; copy the whole directory") from error
        except SafetensorError as error:
            raise BadInput(f"{where / name} is damaged: {error}") from error
    return found


def _added(
    model: nn.Module, table: Mapping[str, object], key: str
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for path, (dtype, shape) in cast("dict[str, tuple[str, list[int]]]", table[key]).items():
        owner, _, name = path.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError as error:
            raise BadInput(
                f"the checkpoint has {path}, the model has no {owner}; is it another model?"
            ) from error
        yield module, name, torch.empty(shape, dtype=float_type(dtype), device="meta")


def _exchange(fresh: Path, where: Path) -> None:
    """Let `where` name what is in `fresh`; what it named before is removed last."""
    if not where.exists():
        fresh.rename(where)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{where.name}.", dir=where.parent)) / "old"
    where.rename(old)
    try:
        fresh.rename(where)
    except BaseException:
        old.rename(where)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _described(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _version() -> str:
    try:
        return metadata.version("qpass")
    except metadata.PackageNotFoundError:
        return "checkout"
