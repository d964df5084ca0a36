from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tbf import cli
from tests.export.tiny_runs import TEXT, tiny_tokenizer, write_export


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"), tiny_tokenizer())


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def verbs() -> list[list[str]]:
    found, groups = [[]], [([], cli.build_parser())]
    while groups:
        path, parser = groups.pop()
        for action in parser._subparsers._group_actions if parser._subparsers else ():
            for name, child in action.choices.items():
                found.append([*path, name])
                groups.append(([*path, name], child))
    return found


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_every_verb_has_help_with_examples(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert " ".join(["tbf", *verb]) in shown.split("examples:")[1]


def test_help_loads_neither_torch_nor_deepspeed(repo_root: Path) -> None:
    program = (
        "import sys\nfrom tbf.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'deepspeed', 'numpy', 'sentencepiece'} & set(sys.modules), 'heavy imports'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"], ["fill-mask"], ["tokenizer"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_fill_mask_prints_a_table(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fill-mask", export, "El [MASK] ladra y el [MASK] duerme.", "--top-k", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].endswith("(mask 1 of 2)")
    assert "%" in lines[1]


def test_fill_mask_json(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fill-mask", export, "Hola [MASK].", "--json", "--top-k", 2) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(c) for c in found["masks"][0]] == [{"token", "token_id", "probability", "text"}] * 2


def test_fill_mask_errors(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fill-mask", export, "sin hueco") == 3
    assert run("fill-mask", tmp_path, "[MASK]") == 4
    assert run("fill-mask", export, "[MASK]", "--top-k", 0) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize("verb", ["embed", "fill-mask"])
def test_fast_is_for_packed_exports(verb: str, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, export, "Hola [MASK].", "--fast") == 2
    assert "fast: only packed models can; export with --format ternary" in capsys.readouterr().err


def test_embed_writes_arrays_and_lines_that_agree(export: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    records = [json.dumps({"body": text}) for text in TEXT]
    (tmp_path / "in.jsonl").write_text("\n".join(records), encoding="utf-8")
    assert run("embed", export, "--file", tmp_path / "in.txt", "--out", tmp_path / "a.npy") == 0
    assert run("embed", export, "--file", tmp_path / "in.jsonl", "--column", "body", "--out", tmp_path / "b.jsonl") == 0
    assert run("embed", export, *TEXT, "--out", tmp_path / "c.npy") == 0
    array = np.load(tmp_path / "a.npy")
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert array.shape == (len(TEXT), 32)
    assert [line["text"] for line in lines] == TEXT
    assert np.array_equal(np.array([line["embedding"] for line in lines], dtype=np.float32), array)
    assert np.array_equal(np.load(tmp_path / "c.npy"), array)
    assert len(list(tmp_path.iterdir())) == 5


def test_embed_reads_standard_input(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hola.\r\n\nAdiós.".encode())))
    assert run("embed", export, "--normalize") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["Hola.", "", "Adiós."]
    assert np.linalg.norm(lines[0]["embedding"]) == pytest.approx(1.0, abs=1e-5)


def test_embed_never_overwrites_unasked(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    out.write_text("precious")
    assert run("embed", export, "Hola", "--out", out) == 2
    assert out.read_text() == "precious"
    assert run("embed", export, "Hola", "--out", out, "--force") == 0
    assert np.load(out).shape == (1, 32)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", "is empty"),
        (b"\n \n", "a.txt", "is empty"),
        (b"hola\nca\xf1a\n", "a.txt", "line 2: not UTF-8 (byte 0xf1)"),
        (b'{"text": "a"}\n{"texto": "b"}\n', "a.jsonl", "line 2: no JSON object with the key 'text'"),
        (b'{"text": 5}\n', "a.jsonl", "line 1: 'text' is 5, not a text"),
        (b"[]\n", "a.jsonl", "line 1: no JSON object"),
        (None, "absent.txt", "No such file"),
    ],
)
def test_embed_names_what_is_wrong_with_a_file(
    export: Path, tmp_path: Path, content: bytes | None, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("embed", export, "--file", tmp_path / name, "--out", tmp_path / "v.npy") == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "v.npy").exists()


def test_embed_usage_errors(export: Path, tmp_path: Path) -> None:
    assert run("embed", export, "a", "--out", tmp_path / "v.csv") == 2
    assert run("embed", export, "a", "--file", tmp_path / "x.txt") == 2
    assert run("embed", export, "a", "--out", tmp_path / "absent" / "v.npy") == 4


def test_tokenizer_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tbf.data.tokenizer import SpanishSPMTokenizer

    (tmp_path / "in.txt").write_text("\n".join(TEXT * 3), encoding="utf-8")
    command = ("tokenizer", "train", tmp_path / "in.txt", "--out", tmp_path / "tok", "--vocab-size", 290)
    assert run(*command) == 0
    trained = SpanishSPMTokenizer.from_pretrained(tmp_path / "tok")
    assert trained.vocab_size == 290
    assert trained.fingerprint[:12] in capsys.readouterr().out
    assert run(*command) == 2
    assert "--force" in capsys.readouterr().err
    assert run(*command, "--force") == 0
    assert run("tokenizer", "train", tmp_path / "nothing", "--out", tmp_path / "tok2") == 3
    assert not (tmp_path / "tok2").exists()


def test_tokenizer_eval_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    (tmp_path / "in.txt").write_text("\n".join(TEXT), encoding="utf-8")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    both = (tmp_path / "tok", tmp_path / "tok" / "tokenizer.model")
    assert run("tokenizer", "eval", *both, "--data", tmp_path) == 0
    shown = capsys.readouterr()
    assert f"on {sum(len(text.split()) for text in TEXT)} words" in shown.out
    assert [line.split()[0] for line in shown.out.splitlines()[2:]] == [str(path) for path in both]
    assert "bad file" in shown.err and "bad.parquet" in shown.err
    assert run("tokenizer", "eval", both[0], "--text", "una casa") == 0
    assert "on 2 words" in capsys.readouterr().out
    (tmp_path / "blank.txt").write_text("\n")
    for given in (("--data", tmp_path / "blank.txt"), ("--text", " "), ("--data", tmp_path / "none.txt")):
        assert run("tokenizer", "eval", both[0], *given) == 3
    assert run("tokenizer", "eval", tmp_path / "none", "--text", "hola") == 3
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 8 different lines per line of TEXT, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("lines")
    tiny_tokenizer().save_pretrained(folder / "tok")
    (folder / "in.txt").write_text("\n".join(f"{t} Número {i}." for i in range(8) for t in TEXT), encoding="utf-8")
    return folder


def prepare(lines: Path, out: Path, *more: object) -> int:
    given = ("--tokenizer", lines / "tok", "--documents", "line", "--min-spanish", 0, "--processes", 1)
    return run("data", "prepare", lines / "in.txt", "--out", out, *given, *more)


def test_data_prepare_and_inspect(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert prepare(lines, out, "--verify") == 0
    shown = capsys.readouterr().out
    assert f"{8 * len(TEXT)} documents" in shown and shown.strip().endswith("every file matches its recorded hash")
    assert run("data", "inspect", out, "--rows", 1, "--seq-len", 128, "--verify", "--samples", 1) == 0
    shown = capsys.readouterr().out
    for words in (f"{8 * len(TEXT)} documents", "every file matches", "bytes a token", "row 0:\n  [1] ", "Número"):
        assert words in shown
    assert shown.count("\n> ") == 1
    assert prepare(lines, out, "--no-nfc") == 3  # other cleaning in the same folder
    assert run("data", "inspect", tmp_path) == 3
    assert run("data", "prepare", tmp_path / "none", "--tokenizer", lines / "tok", "--out", tmp_path / "s2") == 3
    flipped = bytearray((out / "shard-00000.bin").read_bytes())
    flipped[9] ^= 1
    (out / "shard-00000.bin").write_bytes(flipped)
    for command in (("inspect", out, "--verify"), ("prepare", lines / "in.txt", "--out", out)):
        if command[0] == "prepare":
            assert prepare(lines, out, "--verify") == 3
        else:
            assert run("data", *command) == 3
        assert "shard-00000.bin: damaged" in capsys.readouterr().err


def test_data_prepare_usage(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(lines, tmp_path / "s", "--processes", 0) == 2
    assert prepare(lines, tmp_path / "s", "--mix", "a=1,b=1") == 2
    assert prepare(lines, tmp_path / "s", "--shard", "2/2") == 2
    assert run("data", "prepare", "--out", tmp_path / "s") == 2
    assert run("data", "prepare", "--mix", "a=x", "--out", tmp_path / "s") == 2
    assert not (tmp_path / "s").exists()
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_data_prepare_trains_a_tokenizer_where_none_is_given(lines: Path, tmp_path: Path) -> None:
    from tbf.data.tokenizer import SpanishSPMTokenizer

    command = ("data", "prepare", lines / "in.txt", "--documents", "line", "--out", tmp_path / "s", "--min-spanish", 0)
    assert run(*command, "--vocab-size", 300) == 0
    assert SpanishSPMTokenizer.from_pretrained(tmp_path / "s" / "tokenizer").vocab_size == 300


def test_data_prepare_mixes_and_shares_the_work(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"{t} Otro {i}."}) + "\n" for i in range(5) for t in TEXT))
    mix = ("data", "prepare", "--mix", f"{lines / 'in.txt'}=3,{other}=1", "--tokenizer", lines / "tok")
    mix = (*mix, "--documents", "line", "--min-spanish", 0, "--out", tmp_path / "s")
    assert run(*mix, "--shard", "1/2") == 0
    assert "left to the other machines" in capsys.readouterr().out
    assert run(*mix, "--shard", "0/2") == 0
    assert f"{13 * len(TEXT)} documents" in capsys.readouterr().out
    assert run("data", "inspect", tmp_path / "s") == 0
    shown = capsys.readouterr().out
    assert "75.0% of the rows" in shown and "25.0% of the rows" in shown
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert [(source["name"], source["weight"]) for source in index["sources"]] == [
        (str(lines / "in.txt"), 0.75), (str(other), 0.25)
    ]  # fmt: skip


def test_data_gc_deletes_only_when_told(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "cache" / "shards" / "old"
    assert prepare(lines, old) == 0
    (tmp_path / "runs").mkdir()
    gc = ("data", "gc", "--cache", tmp_path / "cache", "--runs", tmp_path / "runs")
    assert run(*gc) == 0
    assert "0 B could go" in capsys.readouterr().out
    assert run(*gc, "--days", 0) == 0
    assert str(old) in (shown := capsys.readouterr().out) and "--yes" in shown
    assert (old / "index.json").exists()
    assert run(*gc, "--days", 0, "--yes") == 0
    assert "freed" in (shown := capsys.readouterr().out) and "run again" not in shown
    assert not old.exists()
    assert run("data", "gc", "--cache", tmp_path / "none") == 2


def test_params_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    from tbf.commands.params import count_ternary
    from tbf.config import load_run_config
    from tbf.model.flops import build_meta, forward_flops_per_token

    assert run("params", "mini_moe", "--set", "model.hidden_size=192") == 0
    shown = capsys.readouterr().out
    model = build_meta(load_run_config("mini_moe", ["model.hidden_size=192"]).model.replace(vocab_size=4096))
    total = model.num_parameters()
    assert f"{total:,}" in shown and "2 of 4 experts" in shown
    assert f"{sum(forward_flops_per_token(model.config, 256).values()) / 1e6:,.2f}" in shown
    experts = sum(p.numel() for name, p in model.named_parameters() if ".ffn." in name and p.ndim == 3)
    assert experts < count_ternary(model) < total
    lines = [line.split() for line in shown.splitlines()]
    counts = [int(words[1].replace(",", "")) for words in lines if len(words) == 5 and words[2].endswith("%")]
    assert sum(counts) == total
    assert run("params", "minni") == 2
    assert "did you mean 'mini'" in capsys.readouterr().err
