from __future__ import annotations

import sys

import numpy as np
import pytest

from tbf.errors import ConfigError
from tbf.evaluate.metrics import confusion, require_libraries, scores

for name in ("sklearn", "scipy", "seqeval"):
    pytest.importorskip(name)


def arrays(*rows: list) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def test_classes_by_hand() -> None:
    found = scores(arrays([0], [0], [1], [1]), arrays([0], [1], [1], [1]), ("a", "b"))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["mcc"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))
    assert "entity_f1" not in found
    table = confusion(arrays([0], [0], [1], [1]), arrays([0], [1], [1], [1]), ("a", "b"))
    assert table["table"] == [[1, 1], [0, 2]]
    assert table["by_label"]["b"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": 0.8, "support": 2}


def test_entities_count_whole() -> None:
    labels = ("B-PER", "I-PER", "O")
    wanted, guessed = arrays([0, 1, 2], [0, 2, 2]), arrays([0, 2, 2], [0, 2, 2])
    assert scores(wanted, guessed, labels)["entity_f1"] == 0.5  # the first name was found in part only
    assert scores(wanted, arrays([2, 2, 2], [2, 2, 2]), labels)["entity_f1"] == 0.0


def test_correlations() -> None:
    wanted = arrays([1.0], [2.0], [3.0], [4.0])
    assert scores(wanted, arrays([1.0], [2.0], [3.0], [40.0]), ())["spearman"] == pytest.approx(1.0)
    assert scores(wanted, arrays([4.0], [3.0], [2.0], [1.0]), ())["pearson"] == pytest.approx(-1.0)
    assert scores(wanted, arrays([2.0], [2.0], [2.0], [2.0]), ()) == {"spearman": 0.0, "pearson": 0.0}
    assert confusion(wanted, wanted, ()) is None


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval", None)
    with pytest.raises(ConfigError, match=r"needs seqeval.*pip install 'tbf\[tasks\]'"):
        require_libraries()
