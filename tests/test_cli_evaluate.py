"""`tbf eval` and `tbf finetune` as they are called."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from tbf import cli
from tests.evaluate.toy_tasks import sentence_rows, token_rows, write_task
from tests.export.tiny_runs import TEXT, tiny_tokenizer, write_export


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(
        tmp_path / "export", tiny_tokenizer(), layer_pattern=["standard_attn"], num_layers=1, num_loops=1
    )


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_eval_shows_a_table_and_keeps_the_result(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("\n".join(TEXT), encoding="utf-8")
    (tmp_path / "u.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in TEXT), encoding="utf-8")
    lines = ("--documents", "line", "--column", "body", "--pseudo-tokens", 20)
    assert run("eval", export, tmp_path / "t.txt", tmp_path / "u.jsonl", *lines) == 0
    shown = capsys.readouterr().out
    assert f"{2 * len(TEXT)} texts" in shown
    assert "pseudo-perplexity" in shown and "content words" in shown
    saved = json.loads((export / "evaluation" / "text-t.json").read_text())
    assert (saved["kind"], saved["texts"], saved["pseudo_tokens"]) == ("text", 2 * len(TEXT), 20)
    assert f"{saved['loss']:.4f}" in shown


def test_eval_of_standard_input_as_json(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for documents, texts in (("file", 1), ("line", 3), ("block", 2)):
        content = f"{TEXT[0]}\n{TEXT[1]}\n\n{TEXT[2]}\n".encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        out = tmp_path / f"{documents}.json"
        assert run("eval", export, "-", "--documents", documents, "--json", "--pseudo-tokens", 0, "--out", out) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["texts"] == texts
        assert "pseudo_perplexity" not in found
        assert json.loads(out.read_text())["loss"] == found["loss"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ca\xf1a")))
    assert run("eval", export, "-") == 3
    assert "not UTF-8 (byte 0xf1 at 2)" in capsys.readouterr().err


def test_eval_reads_no_more_than_asked(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "big.txt").write_text(" ".join(TEXT) * 10_000, encoding="utf-8")  # 1 MB
    limits = ("--max-tokens", 500, "--max-length", 64, "--pseudo-tokens", 0)
    assert run("eval", export, tmp_path / "big.txt", "--json", *limits) == 0
    found = json.loads(capsys.readouterr().out)
    assert 500 <= found["tokens"] < 564


@pytest.mark.parametrize(
    ("content", "name", "code", "message"),
    [
        (b"", "a.txt", 3, "the file is empty"),
        (b" \n\n", "a.txt", 3, "no text in it"),
        (b"hola\nca\xf1a\n", "a.txt", 3, "is not UTF-8 (byte 0xf1)"),
        (b'{"texto": "b"}\n', "a.jsonl", 3, "no line has the key 'text'"),
        (b"PAR1nothing", "a.parquet", 3, "not a readable parquet file"),
        (b"x", "a.pdf", 3, "unknown kind of file"),
        (None, "absent.txt", 3, "no such file"),
    ],
)
def test_eval_names_what_is_wrong_with_a_file(
    export: Path, tmp_path: Path, content: bytes | None, name: str, code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("eval", export, tmp_path / name) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not list((export / "evaluation").glob("*"))


def test_eval_usage_errors(export: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hola", encoding="utf-8")
    assert run("eval", tmp_path, tmp_path / "t.txt") == 4
    for wrong in (("--mask-rate", 2), ("--stride", 99, "--max-length", 20), ("--max-tokens", 0), ("--batch-size", 0)):
        assert run("eval", export, tmp_path / "t.txt", *wrong) == 2
    (tmp_path / "file").write_text("")
    assert run("eval", export, tmp_path / "t.txt", "--out", tmp_path / "file" / "x.json") == 3


def test_a_megabyte_is_cut_for_an_embedding_with_a_notice(
    export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "big.txt").write_text(f"Hola.\n{' '.join(TEXT) * 10_000}\n", encoding="utf-8")
    out = tmp_path / "v.npy"
    assert run("embed", export, "--file", tmp_path / "big.txt", "--out", out, "--max-length", 32) == 0
    assert np.load(out).shape == (2, 32)
    assert "1 of 2 texts were cut to 32 tokens, the first is text 2" in caplog.text


@pytest.mark.parametrize("verb", ["eval", "embed", "fill-mask", "finetune"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.pt"])
def test_a_pickle_in_place_of_weights_is_never_run(
    export: Path, tmp_path: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (export / "model.safetensors").unlink()
    (export / name).write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    (tmp_path / "t.txt").write_text("hola [MASK]", encoding="utf-8")
    given = {"eval": tmp_path / "t.txt", "finetune": write_task(tmp_path / "task")}.get(verb, "hola [MASK]")
    assert run(verb, export, given) == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "touched").exists()
    assert not (export / "evaluation").exists()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_finetune_shows_tables_and_keeps_the_result(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    task = write_task(tmp_path / "ner", token_rows)
    assert run("finetune", export, task, "--epochs", 1, "--seeds", 2, "--max-train-rows", 9, "--max-test-rows", 5) == 0
    shown = capsys.readouterr()
    assert "entity_f1" in shown.out and "seed 1" in shown.out and "right, said:" in shown.out
    saved = json.loads((export / "evaluation" / "ner.json").read_text())
    assert saved["rows"] == {"train": 9, "validation": 8, "test": 5}
    assert len(saved["seeds"]) == 2
    assert run("finetune", export, task, "--epochs", 1, "--seeds", 1, "--json", "--out", tmp_path / "r.json") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "ner"
    assert (tmp_path / "r.json").exists()


def test_finetune_of_a_ternary_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its head learns, and the result says that nothing else did."""
    pytest.importorskip("sklearn")
    export = write_export(tmp_path / "packed", tiny_tokenizer(), "ternary", num_layers=1)
    task = write_task(tmp_path / "task", sentence_rows)
    options = ("--epochs", 2, "--seeds", 1, "--learning-rate", 0.01)
    assert run("finetune", export, task, *options) == 0
    assert "has no weights to train: only the head learns" in caplog.text
    assert "task (head alone)" in capsys.readouterr().out
    first = json.loads((export / "evaluation" / "task.json").read_text())
    assert first["frozen"] is True
    assert run("finetune", export, task, *options, "--frozen") == 0
    again = json.loads((export / "evaluation" / "task.json").read_text())
    assert again["seeds"] == first["seeds"]


def test_finetune_errors(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    unknown = write_task(tmp_path / "task", test={"text": ["a"], "label": [7]})
    assert run("finetune", export, unknown) == 3
    assert "the label '7' is not in train.parquet" in capsys.readouterr().err
    assert run("finetune", export, tmp_path / "nowhere") == 3
    assert run("finetune", tmp_path / "nowhere", unknown) == 4
    assert run("finetune", export, unknown, "--max-train-rows", 0) == 2
    assert run("finetune", export, write_task(tmp_path / "good"), "--epochs", 0) == 2
    assert not list((export / "evaluation").glob("*"))
