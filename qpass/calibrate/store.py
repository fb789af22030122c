"""What a calibration that was cut off leaves behind, so that the next run need not begin again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantizedTensor
from qpass.plan import Plan, Quantized

_KEY = "calibration.json"
_PARTS = ("codes", "row_scales", "group_scales", "group_offsets")


@final
class Store:
    """The codes of finished sites in a directory, which belongs to one calibration.

    `key` says of which (see `key_of`); a directory of another one is a BadInput, as is one that
    cannot be written. Files are whole or absent.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self._folder = Path(folder)
        note = self._folder / _KEY
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                if any(self._folder.iterdir()):
                    raise BadInput(f"{folder}: holds other files; name an empty or a new directory")
                _write(note, json.dumps({"key": key}).encode())
            found = json.loads(note.read_text(encoding="utf-8")).get("key")
        except (OSError, ValueError, AttributeError) as error:
            raise BadInput(f"{folder}: cannot keep a calibration there ({error})") from error
        if found != key:
            raise BadInput(
                f"{folder}: holds the calibration of another model, plan or data\n"
                "  remove it, or name another directory"
            )

    def read(self, entries: Iterable[Quantized]) -> Iterator[tuple[str, QuantizedTensor]]:
        """What is there of these sites; a damaged file counts as absent."""
        for entry in entries:
            path = self._path(entry.site)
            if not path.exists():
                continue
            try:
                parts = safetensors.torch.load_file(path)
                codes, scales = (parts[name] for name in _PARTS[:2])
                grouped = (parts.get(name) for name in _PARTS[2:])
                found = QuantizedTensor(entry.weight, codes, scales, *grouped)
            except (SafetensorError, KeyError, OSError, BadInput):
                continue
            yield entry.site, found

    def write(self, site: str, codes: QuantizedTensor) -> None:
        """Keep the codes of a finished site."""
        values = (
            codes.codes_nk,
            codes.row_scales_n,
            codes.group_scales_ng,
            codes.group_offsets_ng,
        )
        tensors = {n: v.contiguous() for n, v in zip(_PARTS, values, strict=True) if v is not None}
        try:
            _write(self._path(site), safetensors.torch.save(tensors, {"site": site}))
        except OSError as error:
            raise BadInput(f"{self._folder}: cannot be written ({error.strerror})") from error

    def _path(self, site: str) -> Path:
        return self._folder / f"{hashlib.sha256(site.encode()).hexdigest()[:24]}.safetensors"


def key_of(plan: Plan, sources: Mapping[str, Tensor], batches: Iterable[Iterable[object]]) -> str:
    """A digest of all that codes depend on: the choices, the weights and the data."""
    digest = hashlib.sha256(plan.digest().encode())
    for name in sorted(sources):
        digest.update(name.encode())
        _add(digest, sources[name])
    for batch in batches:
        for value in batch:
            _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: object) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    plain = value.detach().cpu().contiguous().reshape(-1)
    if plain.numel():
        digest.update(plain.view(torch.uint8).numpy().data)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
