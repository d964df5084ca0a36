"""The encoder and its heads as transformers models.

Each holds the encoder as `tbf`, so that all of them load one another's files and those of a plain export, whose names
lack that prefix.

Shapes: `B` batch, `T` tokens, `D` hidden, `V` vocabulary, `C` classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from tbf.errors import CheckpointError, ConfigError
from tbf.hf.config import TbfConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.outputs import EncoderOutput


class TbfPreTrainedModel(PreTrainedModel):
    """What the models share: the encoder, loading, checkpointing."""

    config_class = TbfConfig
    base_model_prefix = "tbf"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ("HybridLayer",)

    def __init__(self, config: TbfConfig) -> None:
        super().__init__(config)
        self.tbf = TormentedBertFrankenstein(config.to_ultra())

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but raises CheckpointError when a weight of the encoder is missing: transformers would
        warn and go on with random values."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if name.startswith("tbf."))
        if missing:
            raise CheckpointError(
                f"{model.config.name_or_path}: '{missing[0]}' is missing ({len(missing)} weights of the encoder are); "
                "export the run again with --format hf"
            )
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.tbf.embeddings.table

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ConfigError("the vocabulary of a tbf model is fixed; train a model on the tokenizer you need")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        if new_num_tokens in (None, self.config.vocab_size):
            return self.get_input_embeddings()
        raise ConfigError(
            f"the vocabulary of {self.config.vocab_size} tokens is fixed, {new_num_tokens} were asked for; "
            "train a model on the tokenizer you need"
        )

    def _init_weights(self, module: nn.Module) -> None:
        """The encoder draws its own weights when it is built; only heads are left."""
        if module is getattr(self, "classifier", None):
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_std)
            initialization.zeros_(module.bias)

    def _set_gradient_checkpointing(self, enable: bool = True, **_: Any) -> None:
        """Layer by layer; always non-reentrant, since layers are visited several times."""
        self.gradient_checkpointing = enable
        self.tbf.set_activation_checkpointing("layer" if enable else "none")


class TbfModel(TbfPreTrainedModel):
    """The encoder alone."""

    def __init__(self, config: TbfConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """input_ids [B, T] -> last_hidden_state [B, T, D], pooler_output [B, D] (mean or first token).

        attention_mask [B, T]: 1 at tokens, 0 at padding. segment_ids [B, T] instead: 0 at padding, documents 1, 2, ...
        """
        out = self.tbf(input_ids, attention_mask, segment_ids)
        return _returned(self, return_dict, BaseModelOutputWithPooling(out.last_hidden_state, out.pooler_output))


class TbfForMaskedLM(TbfPreTrainedModel):
    """The encoder with its masked-language-model head."""

    def __init__(self, config: TbfConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """input_ids, labels [B, T] (-100 where nothing is predicted) -> loss [], logits [B, T, V].

        While training, with labels, only the labelled positions are scored, and there are no logits.
        """
        out: EncoderOutput = self.tbf(input_ids, attention_mask, segment_ids, labels=labels)
        sparse = self.training and labels is not None
        logits = None if sparse else self.tbf.predict(out.last_hidden_state)
        return _returned(self, return_dict, MaskedLMOutput(loss=out.loss, logits=logits))


class TbfClassifier(TbfPreTrainedModel):
    """A linear map of states of the encoder, with dropout before it: what the two classifiers share."""

    def __init__(self, config: TbfConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def classify(self, states: Tensor) -> Tensor:
        """states [..., D] -> logits [..., C]."""
        return self.classifier(self.dropout(states))

    def with_router(self, loss: Tensor, out: EncoderOutput) -> Tensor:
        """Adds the weighted router losses of a model with experts, as in pretraining."""
        return self.tbf.with_router_losses(loss, out.router) if self.training else loss


class TbfForSequenceClassification(TbfClassifier):
    """A linear map of the pooled output: classes, several labels at once, or numbers (`config.problem_type`)."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """input_ids [B, T], labels [B] or [B, C] -> loss [], logits [B, C]."""
        out, loss = self.tbf(input_ids, attention_mask), None
        logits = self.classify(out.pooler_output)
        if labels is not None:
            loss = self.with_router(self.loss_function(labels=labels, pooled_logits=logits, config=self.config), out)
        return _returned(self, return_dict, SequenceClassifierOutput(loss=loss, logits=logits))


class TbfForTokenClassification(TbfClassifier):
    """A linear map of each token's state."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """input_ids, labels [B, T] (-100 where there is none) -> loss [], logits [B, T, C]."""
        out, loss = self.tbf(input_ids, attention_mask), None
        logits = self.classify(out.last_hidden_state)
        if labels is not None:
            loss = self.with_router(self.loss_function(logits=logits, labels=labels, config=self.config), out)
        return _returned(self, return_dict, TokenClassifierOutput(loss=loss, logits=logits))


def _returned(model: TbfPreTrainedModel, return_dict: bool | None, output: Any) -> Any:
    """A tuple where one was asked for. The encoder keeps no states of single layers."""
    if model.config.output_hidden_states:
        raise ConfigError("tbf models give no hidden states of single layers; set output_hidden_states to false")
    wanted = model.config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()
