"""Metrics of tasks, computed by scikit-learn, SciPy and seqeval (extra `tasks`)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tbf.errors import ConfigError


@dataclass(frozen=True)
class Metric:
    """What is known about a metric; larger is better for all of them."""

    name: str
    regression: bool = False


METRICS = {
    "accuracy": Metric("accuracy"),
    "macro_f1": Metric("macro F1"),
    "mcc": Metric("Matthews correlation"),
    "entity_f1": Metric("entity F1"),
    "spearman": Metric("Spearman correlation", regression=True),
    "pearson": Metric("Pearson correlation", regression=True),
}


def require_libraries() -> None:
    """Raises ConfigError when a library that computes metrics is missing."""
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy"), ("seqeval", "seqeval")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise ConfigError(
                f"fine-tuning needs {package}, which is not installed: pip install 'tbf[tasks]'"
            ) from None


def scores(wanted: Sequence[np.ndarray], guessed: Sequence[np.ndarray], labels: tuple[str, ...]) -> dict[str, float]:
    """All metrics that fit, by name; one array a row, of numbers of labels or, without labels, of values.

    A correlation with a constant is 0, since nothing was told apart.
    """
    truth, guess = np.concatenate(wanted), np.concatenate(guessed)
    if not labels:
        return {"spearman": _correlation("spearmanr", truth, guess), "pearson": _correlation("pearsonr", truth, guess)}
    from sklearn import metrics

    found = {
        "accuracy": metrics.accuracy_score(truth, guess),
        "macro_f1": metrics.f1_score(truth, guess, average="macro", zero_division=0),
        "mcc": metrics.matthews_corrcoef(truth, guess),
    }
    if all(label == "O" or label[:2] in ("B-", "I-") for label in labels):
        from seqeval.metrics import f1_score

        named = [[[labels[i] for i in row] for row in rows] for rows in (wanted, guessed)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no entity was found: the score is 0 and says it all
            found["entity_f1"] = f1_score(*named, zero_division=0)
    return {name: float(value) for name, value in found.items()}


def confusion(
    wanted: Sequence[np.ndarray], guessed: Sequence[np.ndarray], labels: tuple[str, ...]
) -> dict[str, Any] | None:
    """The confusion table (rows: what is right, columns: what was said) and precision, recall and F1 of each label.

    None for a regression.
    """
    if not labels:
        return None
    from sklearn import metrics

    truth, guess, numbers = np.concatenate(wanted), np.concatenate(guessed), list(range(len(labels)))
    parts = metrics.precision_recall_fscore_support(truth, guess, labels=numbers, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    by_label = {
        label: {name: float(part[i]) if name != "support" else int(part[i]) for name, part in zip(names, parts)}
        for i, label in enumerate(labels)
    }
    return {
        "labels": list(labels),
        "table": metrics.confusion_matrix(truth, guess, labels=numbers).tolist(),
        "by_label": by_label,
    }


def _correlation(name: str, truth: np.ndarray, guess: np.ndarray) -> float:
    from scipy import stats

    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(guess) == 0:
        return 0.0
    return float(getattr(stats, name)(truth, guess).statistic)
