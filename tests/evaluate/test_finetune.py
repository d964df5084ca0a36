from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError
from tbf.evaluate.finetune import Tuning, finetune
from tbf.evaluate.task_rows import encode
from tbf.evaluate.tasks import read_task
from tbf.model.encoder import TormentedBertFrankenstein
from tests.evaluate.toy_tasks import WORDS, pair_rows, sentence_rows, token_rows, write_task
from tests.export.tiny_runs import TEXT, tiny_model

for name in ("sklearn", "scipy", "seqeval"):
    pytest.importorskip(name)

Pair = tuple[TormentedBertFrankenstein, SpanishSPMTokenizer]
QUICK = Tuning(learning_rates=(5e-3,), epochs=12, patience=12, seeds=1, batch_size=8, max_length=64)
PLAIN = {"layer_pattern": ["standard_attn"], "num_layers": 2, "num_loops": 1, "use_bitnet": False}


@pytest.fixture(scope="module")
def plain() -> Pair:
    """A small BERT, for speed."""
    tokenizer = SpanishSPMTokenizer.train([*TEXT, *WORDS], 300)
    return tiny_model(tokenizer, **PLAIN), tokenizer


def test_words_are_learnt(plain: Pair, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in plain[0].state_dict().items()}
    result = finetune(*plain, read_task(write_task(tmp_path / "words", token_rows)), QUICK)
    assert result["test_metrics"]["accuracy"]["mean"] > 0.9
    assert result["test"] == result["test_metrics"]["entity_f1"]
    assert sum(map(sum, result["confusion"]["table"])) == sum(map(len, token_rows(8, 32)["tokens"]))
    assert all(torch.equal(value, before[name]) for name, value in plain[0].state_dict().items())


def test_a_ternary_model_learns_texts(pair: Pair, tmp_path: Path) -> None:
    result = finetune(*pair, read_task(write_task(tmp_path / "texts")), dataclasses.replace(QUICK, epochs=6))
    assert result["seeds"][0]["validation"] > 0.8
    assert result["metric"] == "macro_f1"


def test_pairs_with_scores_are_learnt_and_seeds_repeat(plain: Pair, tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "pairs", pair_rows))
    tuning = dataclasses.replace(QUICK, seeds=2)
    first, second = finetune(*plain, task, tuning), finetune(*plain, task, tuning)
    assert first == second
    assert first["test"]["mean"] > 0.5
    assert first["test"]["spread"] > 0.0
    assert first["confusion"] is None


def test_validation_chooses_among_learning_rates_and_stops_early(plain: Pair, tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "texts", sentence_rows))
    tuning = Tuning(learning_rates=(1e-9, 5e-3), epochs=8, patience=2, seeds=1, batch_size=8)
    result = finetune(*plain, task, tuning)
    assert result["learning_rate"] == 5e-3
    assert result["learning_rates_tried"]["1e-09"] < result["learning_rates_tried"]["0.005"]
    stuck = finetune(*plain, task, Tuning(learning_rates=(1e-9,), epochs=8, patience=2, seeds=1, batch_size=8))
    assert stuck["seeds"][0]["epochs"] == 3  # the first is always the best so far


def test_a_frozen_encoder_gives_what_it_gives_in_one_pass(plain: Pair, tmp_path: Path) -> None:
    model, tokenizer = plain
    calls, forward = [], model.forward

    def counted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    model.forward = counted
    try:
        task = read_task(write_task(tmp_path / "words", token_rows))
        tuning = Tuning(learning_rates=(3e-2,), epochs=15, patience=15, seeds=2, batch_size=8, frozen=True)
        result = finetune(model, tokenizer, task, tuning)
    finally:
        del model.forward
    assert calls == [False] * 5  # 24 + 8 + 8 rows in batches of 8, once for all seeds and epochs
    assert result["test_metrics"]["accuracy"]["mean"] > 0.8


def test_long_rows_are_cut_with_a_notice(plain: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = read_task(write_task(tmp_path / "words", token_rows))
    rows = encode(plain[1], task, task.splits["train"], 6)
    assert all(len(row.ids) <= 6 and len(row.places) == len(row.target) for row in rows)
    assert "rows were cut to 6 tokens" in caplog.text
    task = read_task(write_task(tmp_path / "pairs", pair_rows))
    rows = encode(plain[1], task, task.splits["train"], 9)
    assert max(len(row.ids) for row in rows) == 9
    assert all((row.ids == plain[1].sep_id).sum() == 2 for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"learning_rates": (0.0,)}, "learning rates"),
        ({"max_length": 2}, "max_length is 2"),
    ],
)
def test_refusals(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tuning(**given)
