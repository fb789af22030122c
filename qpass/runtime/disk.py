"""What an earlier process worked out: small files beside those that inductor keeps for itself."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from qpass.errors import QpassError

T = TypeVar("T")
FOLDER = "qpass"


def kept(
    kind: str, key: str, make: Callable[[], T], read: Callable[[str], T], text: Callable[[T], str]
) -> T:
    """What `make` gives, or gave an earlier process under the same `key`.

    `text` and `read` are how it is written and read back. Inductor's settings decide where files
    lie and whether there are any; one that cannot be read or written is as good as none.
    """
    if torch.compiler.config.force_disable_caches:
        return make()
    path = Path(cache_dir()) / FOLDER / f"{kind}-{key}"
    with contextlib.suppress(OSError, UnicodeDecodeError, QpassError):
        found = read(path.read_text(encoding="utf-8"))
        counters["qpass"][f"{kind}_cache_hit"] += 1
        return found
    counters["qpass"][f"{kind}_cache_miss"] += 1
    made = make()
    with contextlib.suppress(OSError):
        _write(path, text(made))
    return made


def _write(path: Path, text: str) -> None:
    """Write a file as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def fingerprint(texts: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """A key of texts and of what tensors hold, for this code of qpass and this torch."""
    found = hashlib.sha256(_code())
    for text in texts:
        found.update(f"{len(text)}:{text}".encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            whole = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(whole.view(torch.uint8).numpy().data)
    return found.hexdigest()


@functools.cache
def _code() -> bytes:
    """What says which code this is: results of another one are not taken."""
    found = hashlib.sha256(str(torch.__version__).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.digest()
