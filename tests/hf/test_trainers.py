"""The trainers of transformers and sentence-transformers work with our models, where they are installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

import tbf.hf  # noqa: F401
from tbf.evaluate.embeddings import embed
from tbf.export.plain import load_pretrained
from tests.export.tiny_runs import TEXT
from tests.hf.conftest import hf_export


def test_transformers_trainer(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(exported)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=4,
        save_strategy="no",
    )
    trainer = Trainer(
        AutoModelForMaskedLM.from_pretrained(exported),
        arguments,
        train_dataset=[tokenizer(text) for text in TEXT],
        eval_dataset=[tokenizer(text) for text in TEXT],
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    torch.manual_seed(0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(str(tmp_path / "saved"))
    assert load_pretrained(tmp_path / "saved")[0].config == load_pretrained(exported)[0].config


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_opens_an_export(pooling: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = hf_export(tmp_path / pooling, pooling)
    model = library.SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 64
    expected = embed(*load_pretrained(folder), TEXT, max_length=64)
    np.testing.assert_allclose(model.encode(TEXT), expected, rtol=1e-4, atol=1e-5)


def test_sentence_transformers_trainer(exported: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    pytest.importorskip("accelerate")
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = library.SentenceTransformer(str(shutil.copytree(exported, tmp_path / "model")), device="cpu")
    before = model.encode(TEXT)
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    pairs = Dataset.from_dict({"anchor": TEXT, "positive": list(reversed(TEXT))})
    library.SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model)).train()
    trained = model.encode(TEXT)
    assert np.isfinite(trained).all()
    assert np.abs(trained - before).max() > 1e-4
    model.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXT), trained, rtol=1e-4, atol=1e-5)
