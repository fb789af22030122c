"""Which model types there are, and what each is run as."""

from __future__ import annotations

from dataclasses import dataclass

import transformers as hf
from transformers.models.auto import modeling_auto

# in this order: a type that several list is run as the first
_LISTED = {
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model type of transformers, as the class that computes the most of it."""

    type: str
    task: str
    class_name: str

    def model_class(self) -> type[hf.PreTrainedModel]:
        """The class; raises what importing it raises."""
        return getattr(hf, self.class_name)


def architectures() -> tuple[Architecture, ...]:
    """All types of the installed transformers that model text, images or sound."""
    found: dict[str, Architecture] = {}
    for task, mapping in _LISTED.items():
        for kind, names in getattr(modeling_auto, mapping).items():
            name = names if isinstance(names, str) else names[0]
            found.setdefault(kind, Architecture(kind, task, name))
    return tuple(found.values())


def architecture(kind: str) -> Architecture:
    """The architecture of a model type."""
    return next(a for a in architectures() if a.type == kind)
