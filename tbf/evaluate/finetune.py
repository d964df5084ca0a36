"""Fine-tunes a model on a task: a linear head on the encoder, early stopping on the validation rows.

Shapes: `D` hidden, `C` classes (1 for a regression), `K` things to label in a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError
from tbf.evaluate.batches import by_length
from tbf.evaluate.metrics import confusion, scores
from tbf.evaluate.task_rows import Batch, Row, encode, side_by_side
from tbf.evaluate.tasks import Task
from tbf.model.bitlinear import invalidate_ternary

if TYPE_CHECKING:
    from tbf.model.encoder import TormentedBertFrankenstein

BUCKET = 50
"""Batches whose rows are sorted by length together: little padding, and still in random order."""


@dataclass(frozen=True)
class Tuning:
    """How a model is fine-tuned."""

    learning_rates: tuple[float, ...] = (2e-4,)
    """Several: the first seed tries each, and the validation rows choose."""
    epochs: int = 10
    patience: int = 3
    """Epochs without a better validation score after which tuning stops."""
    batch_size: int = 16
    max_length: int = 512
    seeds: int = 3
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.1
    frozen: bool = False
    """Train the head alone."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f"learning rates are {list(self.learning_rates)}; they must be above 0, e.g. 2e-4")
        if self.max_length < 4:
            raise ConfigError(f"max_length is {self.max_length}; it must be at least 4")


class TaskModel(nn.Module):
    """The encoder with a linear head on the states of words, or on the pooled state of rows."""

    def __init__(self, encoder: TormentedBertFrankenstein, task: Task, tuning: Tuning) -> None:
        super().__init__()
        self.encoder, self.of_words = encoder, task.kind == "token"
        self.dropout = nn.Dropout(tuning.dropout)
        self.head = nn.Linear(encoder.config.hidden_size, len(task.labels) or 1)
        nn.init.normal_(self.head.weight, std=encoder.config.initializer_std)
        nn.init.zeros_(self.head.bias)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is labelled: ([K, D], weighted router losses []); K is B for whole rows."""
        out = self.encoder(batch.ids, attention_mask=batch.mask)
        states = out.last_hidden_state[batch.rows, batch.places] if self.of_words else out.pooler_output
        extra = states.new_zeros(())
        return states, self.encoder.with_router_losses(extra, out.router) if self.training else extra

    def label(self, states: Tensor) -> Tensor:
        """[K, D] -> logits [K, C]."""
        return self.head(self.dropout(states))


def finetune(
    model: TormentedBertFrankenstein, tokenizer: SpanishSPMTokenizer, task: Task, tuning: Tuning, progress: bool = False
) -> dict[str, Any]:
    """Fine-tunes copies of `model`, one a seed, and scores them on the test rows; `model` stays as it is.

    Returns, ready for JSON, every metric's mean and spread (sample standard deviation) over the seeds, each seed's
    validation and test scores, and the confusion table of all seeds' test guesses.
    """
    rows = {split: encode(tokenizer, task, examples, tuning.max_length) for split, examples in task.splits.items()}
    if tuning.frozen:
        rows = {split: with_states(model, task, part, tuning, progress) for split, part in rows.items()}
    tried = {}
    for candidate in tuning.learning_rates:
        run = _Run(model, task, tuning, candidate, seed=0, progress=progress)
        run.fit(rows)
        tried[candidate] = run
    rate = max(tried, key=lambda candidate: tried[candidate].best)
    runs = [tried[rate]]  # the first seed's
    for seed in range(1, tuning.seeds):
        runs.append(_Run(model, task, tuning, rate, seed=seed, progress=progress))
        runs[-1].fit(rows)
    wanted = [row.target for row in rows["test"]]
    tests = [scores(wanted, run.test_guesses, task.labels) for run in runs]
    found = {name: [test[name] for test in tests] for name in tests[0]}
    pooled = [guess for run in runs for guess in run.test_guesses]
    return {
        "kind": "task",
        "task": task.name,
        "task_kind": task.kind,
        "metric": task.metric,
        "rows": {split: len(examples) for split, examples in rows.items()},
        "learning_rate": rate,
        "learning_rates_tried": {f"{candidate:g}": run.best for candidate, run in tried.items()},
        "seeds": [
            {"seed": run.seed, "epochs": run.epochs, "validation": run.best, "test": test}
            for run, test in zip(runs, tests)
        ],
        "test": _spread(found[task.metric]),
        "test_metrics": {name: _spread(values) for name, values in found.items()},
        "confusion": confusion(wanted * len(runs), pooled, task.labels),
    }


def with_states(
    model: TormentedBertFrankenstein, task: Task, rows: list[Row], tuning: Tuning, progress: bool = False
) -> list[Row]:
    """The rows with what the encoder makes of them: a frozen one need not read them again in every epoch."""
    reader, device = TaskModel(model, task, tuning).eval(), next(model.parameters()).device
    found: list[Row] = [*rows]
    with torch.no_grad(), tqdm(total=len(rows), unit=" rows", disable=None if progress else True) as bar:
        for chosen in by_length([len(row.ids) for row in rows], tuning.batch_size):
            states, _ = reader.states(side_by_side([rows[i] for i in chosen], device))
            parts = np.split(states.cpu().numpy(), np.cumsum([len(rows[i].target) for i in chosen])[:-1])
            for i, part in zip(chosen, parts):
                found[i] = rows[i]._replace(states=part)
            bar.update(len(chosen))
    return found


class _Run:
    """One seed with one learning rate."""

    def __init__(
        self, model: TormentedBertFrankenstein, task: Task, tuning: Tuning, rate: float, *, seed: int, progress: bool
    ) -> None:
        torch.manual_seed(seed)
        self.task, self.tuning, self.rate, self.seed, self.progress = task, tuning, rate, seed, progress
        self.model = TaskModel(model if tuning.frozen else copy.deepcopy(model), task, tuning)
        self.random = np.random.default_rng(seed)
        self.best, self.epochs = -np.inf, 0
        self.test_guesses: list[np.ndarray] = []
        self.mean, self.scale = 0.0, 1.0

    def fit(self, rows: dict[str, list[Row]]) -> None:
        """Trains until the validation score stops rising, goes back to the best epoch and guesses the test rows."""
        if self.task.regression:
            values = np.concatenate([row.target for row in rows["train"]])
            self.mean, self.scale = float(values.mean()), float(values.std()) or 1.0
        trained = self.model.head if self.tuning.frozen else self.model
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.tuning.weight_decay}, {"params": others, "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        total = self.tuning.epochs * -(-len(rows["train"]) // self.tuning.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._factor(step, total))
        wanted = [row.target for row in rows["validation"]]
        best_state, waited = None, 0
        title = f"{self.task.name}, lr {self.rate:g}, seed {self.seed}"
        with tqdm(total=total, unit=" steps", desc=title, disable=None if self.progress else True) as bar:
            for _ in range(self.tuning.epochs):
                self._epoch(rows["train"], parameters, optimizer, schedule, bar)
                self.epochs += 1
                score = scores(wanted, self.guess(rows["validation"]), self.task.labels)[self.task.metric]
                bar.set_postfix_str(f"validation {self.task.metric} {score:.3f}")
                waited += 1
                if score > self.best:
                    self.best, waited = score, 0
                    best_state = copy.deepcopy(trained.state_dict())
                if waited >= self.tuning.patience:
                    break
        trained.load_state_dict(best_state)
        invalidate_ternary()
        self.test_guesses = self.guess(rows["test"])
        del self.model

    def guess(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Label numbers, or values, for each row, in the order given."""
        self.model.eval()
        guesses: list[np.ndarray] = [np.empty(0)] * len(rows)
        for chosen in by_length([len(row.ids) for row in rows], 2 * self.tuning.batch_size):
            with torch.no_grad():
                logits, _ = self._logits([rows[i] for i in chosen])
            values = logits[:, 0] * self.scale + self.mean if self.task.regression else logits.argmax(-1)
            sizes = np.cumsum([len(rows[i].target) for i in chosen])
            for i, part in zip(chosen, np.split(values.cpu().numpy(), sizes[:-1])):
                guesses[i] = part
        return guesses

    def _epoch(self, rows: Sequence[Row], parameters: list, optimizer: Any, schedule: Any, bar: tqdm) -> None:
        self.model.train()
        self.model.encoder.train(not self.tuning.frozen)
        for batch in self._shuffled(rows):
            logits, extra = self._logits(batch)
            target = torch.from_numpy(np.concatenate([row.target for row in batch])).to(logits.device)
            if self.task.regression:
                loss = F.mse_loss(logits[:, 0], ((target - self.mean) / self.scale).to(logits.dtype))
            else:
                loss = F.cross_entropy(logits, target)
            if not torch.isfinite(loss):
                raise DataError(f"{bar.desc}: the loss is {loss.item()} at step {bar.n}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            (loss + extra).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()

    def _shuffled(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        size = self.tuning.batch_size
        order = self.random.permutation(len(rows))
        batches = []
        for start in range(0, len(order), BUCKET * size):
            bucket = sorted(order[start : start + BUCKET * size], key=lambda i: len(rows[i].ids))
            batches += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        for number in self.random.permutation(len(batches)):
            yield [rows[i] for i in batches[number]]

    def _logits(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        if self.tuning.frozen:
            states = torch.from_numpy(np.concatenate([row.states for row in rows])).to(self.model.head.weight.device)
            return self.model.label(states), states.new_zeros(())
        states, extra = self.model.states(side_by_side(rows, self.model.head.weight.device))
        return self.model.label(states), extra

    def _factor(self, step: int, total: int) -> float:
        """Linear warm-up and decay of the learning rate."""
        warmup = max(1, round(self.tuning.warmup_share * total))
        return min((step + 1) / warmup, max(0.0, (total - step) / max(1, total - warmup)))


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value."""
    return {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
