"""A model of speech: how likely it finds the words of sentences that are read to it.

A synthetic voice reads them, so any text serves, and what was said is known.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Sequence

import torch
import transformers as hf
from torch import Tensor, nn

from tests.accuracy.grid import OF_OTHERS, SETTINGS
from tests.accuracy.sentences import sentences_of
from tests.accuracy.task import Task, predictions_lost
from tests.data.fetch import DATA, fresh, publish
from tests.real.models import REAL, fetched

VOICE = "espeakng-loader==0.2.4"
RATE = 16_000  # samples a second that the model reads
TOGETHER = 4
START = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"


class _Voice:
    """The library of the voice; it speaks for the whole process."""

    def __init__(self) -> None:
        folder = DATA / "speech"
        if not folder.exists():
            partial = fresh(folder)
            command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
            subprocess.run([*command, "--target", str(partial), VOICE], check=True)
            publish(partial, folder)
        place = folder / "espeakng_loader"
        self._library = ctypes.CDLL(str(place / "libespeak-ng.so"))
        data = str(place / "espeak-ng-data").encode()
        self._rate: int = self._library.espeak_Initialize(2, 0, data, 0)
        self._library.espeak_SetVoiceByName(b"en-us")
        self._heard: list[int] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._listen = kind(self._hear)
        self._library.espeak_SetSynthCallback(self._listen)

    def _hear(self, samples: ctypes.Array[ctypes.c_short], count: int, _events: object) -> int:
        if samples and count > 0:
            self._heard += samples[:count]
        return 0

    def says(self, text: str) -> Tensor:
        """Samples `[n]` at `RATE`, from -1 to 1."""
        self._heard.clear()
        spoken = text.encode() + b"\0"
        self._library.espeak_Synth(spoken, len(spoken), 0, 1, 0, 1, None, None)
        self._library.espeak_Synchronize()
        wave = torch.tensor(self._heard, dtype=torch.float32)[None, None] / 2**15
        length = wave.shape[-1] * RATE // self._rate
        return torch.nn.functional.interpolate(wave, size=length, mode="linear")[0, 0]


@functools.cache
def _voice() -> _Voice:
    return _Voice()


def _batches(sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    folder = next(fetched("whisper").glob("*part1")) / "data"
    tokens = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    hears = hf.WhisperFeatureExtractor()
    batches: list[dict[str, Tensor]] = []
    for at in range(0, len(sentences), TOGETHER):
        part = sentences[at : at + TOGETHER]
        waves = [_voice().says(sentence).numpy() for sentence in part]
        ids = [
            tokens(f"{START} {s}<|endoftext|>", add_special_tokens=False).input_ids for s in part
        ]
        heard = hears(waves, sampling_rate=RATE, return_tensors="pt")
        longest = max(map(len, ids))
        end = ids[0][-1]
        batches.append(
            {
                "input_features": heard.input_features,
                "decoder_input_ids": torch.tensor([i + [end] * (longest - len(i)) for i in ids]),
                "decoder_attention_mask": torch.tensor(
                    [[1] * len(i) + [0] * (longest - len(i)) for i in ids]
                ),
            }
        )
    return batches


@functools.cache
def _read_aloud(name: str, count: int, start: int = 0) -> tuple[dict[str, Tensor], ...]:
    """`count` sentences that take less than half a minute, spread over a text."""
    fit = [s for s in sentences_of(name) if len(s.split()) <= 40]
    return tuple(_batches(fit[start :: max(1, len(fit) // count)][:count]))


def judged(model: nn.Module, reference: nn.Module) -> float:
    # sentences between those that are calibrated on
    return predictions_lost(model, reference, _read_aloud("calibration", 8, 1))[0]["KL"]


def lost(model: nn.Module, reference: nn.Module, every: int) -> tuple[dict[str, float], int]:
    return predictions_lost(model, reference, _read_aloud("evaluation", 96 // every))


TASK = Task(
    read=REAL["whisper"].read,
    calibration=lambda count: _read_aloud("calibration", count),
    sample=lambda: _read_aloud("calibration", TOGETHER)[0],
    lost=lost,
    judged=judged,
    amount=32,
    every=4,
    seeds=1,
    settings=tuple(SETTINGS),
    methods=OF_OTHERS,
)
