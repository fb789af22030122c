"""How does a text file become windows of tokens?"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpass.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

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

        def following() -> Iterator[Tensor]:
            for done, batch in enumerate(batches):
                advance(step, done, len(batches))
                yield batch
            advance(step, len(batches), len(batches))

        yield following()


def read_windows(
    tokenizer: str, file: Path | None, length: int, count: int
) -> tuple[Tensor, ...] | None:
    """At most `count` windows `[1, length]` of the file's tokens; None without a file."""
    if file is None:
        return None
    import torch

    from qpass.hf.pretrained import token_ids
    from qpass.verify import windows

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: is no text that can be read ({error})") from error
    every = windows(token_ids(tokenizer, text), length)
    at = torch.linspace(0, len(every) - 1, min(count, len(every)), device="cpu").round().long()
    return every[at].split(1)
