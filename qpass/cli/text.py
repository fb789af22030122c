"""How does a file of text or of tokens become windows?"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qpass.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from qpass.report.terminal import Progress

Length = Annotated[int, typer.Option(min=2, help="Tokens of one window of text.")]
Windows = Annotated[int, typer.Option(min=1, help="At most so many windows, evenly spaced.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Where the tokenizer is, if not beside the model.")
]


@contextmanager
def tracked(step: str, batches: Sequence[Tensor]) -> Generator[Iterator[Tensor]]:
    """The batches, one after the other, with a bar on a terminal that says how far they are."""
    from qpass.report import progress

    with progress() as advance:
        yield followed(advance, step, batches)


def followed(advance: Progress, step: str, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The batches, one after the other, of which `advance` is told."""
    for done, batch in enumerate(batches):
        advance(step, done, len(batches))
        yield batch
    advance(step, len(batches), len(batches))


def read_windows(
    tokenizer: str, file: Path | None, length: int, count: int
) -> tuple[Tensor, ...] | None:
    """At most `count` windows `[1, length]` of the file's tokens; None without a file.

    A file is a text, JSON lines with a "text" or "input_ids" each, or token ids in `.npy` or
    `.safetensors`, whose rows are the windows where it has rows.
    """
    if file is None:
        return None
    import torch

    from qpass.verify import windows

    ids = _token_ids(tokenizer, file)
    every = ids if ids.dim() == 2 else windows(ids, length)
    at = torch.linspace(0, len(every) - 1, min(count, len(every)), device="cpu").round().long()
    return every[at].split(1)


def _token_ids(tokenizer: str, file: Path) -> Tensor:
    """The token ids of a file, `[n]` or `[windows, length]`."""
    from qpass.hf.pretrained import token_ids

    if file.suffix == ".npy":
        return _whole_numbers(file, _array(file))
    if file.suffix == ".safetensors":
        return _whole_numbers(file, _tensor(file))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: is no text that can be read ({error})") from error
    if file.suffix != ".jsonl":
        return token_ids(tokenizer, text)
    return _documents(tokenizer, file, text)


def _documents(tokenizer: str, file: Path, lines: str) -> Tensor:
    """The tokens of all lines, one document behind the other."""
    import torch

    from qpass.hf.pretrained import token_ids

    texts: list[str] = []
    ids: list[int] = []
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{file}:{number}: is not JSON ({error})") from error
        found = cast("dict[str, object]", record) if isinstance(record, dict) else {}
        text, tokens = found.get("text"), found.get("input_ids")
        if isinstance(text, str):
            texts.append(text)
        elif isinstance(tokens, list) and all(type(t) is int for t in cast("list[object]", tokens)):
            ids += cast("list[int]", tokens)
        else:
            raise BadInput(f'{file}:{number}: expected an object with "text" or "input_ids"')
    if texts and ids:
        raise BadInput(f'{file}: some lines have "text" and some "input_ids"; use one of them')
    if texts:
        return token_ids(tokenizer, "\n\n".join(texts))
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _array(file: Path) -> Tensor:
    import numpy
    import torch

    try:
        return torch.from_numpy(numpy.load(file, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{file}: is no array of token ids ({error})") from error


def _tensor(file: Path) -> Tensor:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file}: is no safetensors file ({error})") from error
    found = tensors.get("input_ids", next(iter(tensors.values())) if len(tensors) == 1 else None)
    if found is None:
        raise BadInput(f'{file}: holds {len(tensors)} tensors and none is called "input_ids"')
    return found


def _whole_numbers(file: Path, ids: Tensor) -> Tensor:
    """Token ids as they are used; BadInput for what cannot be any."""
    whole = not (ids.is_floating_point() or ids.is_complex())
    if not whole or ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[1] < 2):
        raise BadInput(
            f"{file}: token ids are integers [n] or [windows, length], not {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if ids.numel() == 0 or int(ids.min()) < 0:
        raise BadInput(f"{file}: {'is empty' if ids.numel() == 0 else 'has a negative token id'}")
    return ids.long()
