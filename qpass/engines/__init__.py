"""Other engines that `qpass bench` times beside qpass, where they are installed."""

from qpass.engines.base import ENGINES, Engine, Source, opened

__all__ = ["ENGINES", "Engine", "Source", "opened"]
