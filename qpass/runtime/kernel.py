"""Which kernel serves a call, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """A kernel that was passed over."""

    kernel: str
    why: str


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves a call; `refused` lists the ones preferred to it."""

    kernel: str
    refused: tuple[Refusal, ...]

    def text(self) -> str:
        """One line for the choice and one for each refusal."""
        lines = [self.kernel, *(f"  not {r.kernel}: {r.why}" for r in self.refused)]
        return "\n".join(lines)
