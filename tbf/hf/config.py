"""UltraConfig in the form that Hugging Face transformers keeps and saves."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from tbf.errors import ConfigError
from tbf.model.config import UltraConfig

OWN = tuple(field.name for field in dataclasses.fields(UltraConfig))


class TbfConfig(PreTrainedConfig):
    """The fields of UltraConfig under their own names, beside those of every transformers configuration.

    All of them are saved, defaults included: a later default changes no model that exists. `classifier_dropout` is the
    dropout before a classification head. Raises ConfigError on impossible combinations.
    """

    model_type = "tbf"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    def __init__(self, classifier_dropout: float = 0.1, **kwargs: Any) -> None:
        if not 0 <= classifier_dropout < 1:
            raise ConfigError(f"classifier_dropout is {classifier_dropout}; it must lie in [0, 1), e.g. 0.1")
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        own = UltraConfig(**{name: kwargs.pop(name) for name in OWN if name in kwargs})
        for name, value in own.to_dict().items():
            setattr(self, name, value)
        self.classifier_dropout = classifier_dropout
        super().__init__(**kwargs)

    def to_ultra(self) -> UltraConfig:
        """The configuration of the encoder."""
        return UltraConfig(**{name: getattr(self, name) for name in OWN})
