from __future__ import annotations

import unicodedata
from collections import Counter

import pytest

from tbf.data.cleaning import CleanOptions, clean, split_long
from tbf.data.spanish import spanish_score
from tbf.errors import ConfigError

SPANISH = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo."
OFF = CleanOptions(nfc=False, control=False, min_chars=0, max_chars=0, min_spanish=0, duplicates=False)


def run(text, **options):
    counts = Counter()
    return clean(text, CleanOptions(**{"min_chars": 1, "min_spanish": 0, **options}), counts), +counts


def test_clean_text_is_untouched():
    assert run(SPANISH) == ([SPANISH], {})


def test_nfc():
    decomposed = unicodedata.normalize("NFD", SPANISH)
    assert run(decomposed) == ([SPANISH], {"nfc_changed": 1})
    assert run(decomposed, nfc=False) == ([decomposed], {})


def test_control_characters():
    assert run("a\x00b\x07c\r\nd\re\u202e\ufeff f\tg") == (["abc\nd\ne f\tg"], {"control_removed": 1})
    assert run("a\x07b", control=False) == (["a\x07b"], {})
    assert run("👩\u200d👧")[0] == ["👩\u200d👧"]


def test_short_and_empty():
    assert run(" \n\t ") == ([], {"empty": 1})
    assert run("corto", min_chars=20) == ([], {"too_short": 1})
    assert run("corto", min_chars=5) == (["corto"], {})


def test_long_documents_are_cut_and_lose_nothing():
    text = "\n\n".join(" ".join(f"palabra{i}-{j}" for j in range(40)) for i in range(30))
    pieces, counts = run(text, max_chars=2000)
    assert counts == {"split": 1, "split_pieces": len(pieces)}
    assert all(len(piece) <= 2000 for piece in pieces)
    assert " ".join(pieces).split() == text.split()
    assert "".join(split_long("x" * 5000, 1000)) == "x" * 5000
    assert all(piece.startswith("palabra") for piece in pieces)


def test_everything_off():
    assert clean("x\x00", OFF, Counter()) == ["x\x00"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (SPANISH, True),
        ("hola mundo " * 30, True),
        ("The cat sat on the mat and it was not amused by the dog that had come with them.", False),
        (
            "Le chat est sur la table et il ne veut pas descendre pour les enfants qui sont avec nous dans la maison",
            False,
        ),
        (
            "Não sei o que ele disse, mas também foi uma das coisas que ela não fez no dia em que as pessoas saíram",
            False,
        ),
        ("Die Katze ist auf dem Tisch und will nicht mit den Kindern von der Straße gehen", False),
        ("他们昨天去了北京的一个大公园里散步聊天", False),
        ("Привет, как дела у тебя сегодня, мой друг?", False),
        ("0123 4567 89 " * 10, False),
    ],
)
def test_spanish_score(text, kept):
    documents, counts = run(text, min_spanish=0.65)
    assert bool(documents) is kept
    assert counts == ({} if kept else {"not_spanish": 1})
    assert 0.0 <= spanish_score(text) <= 1.0


def test_options_are_checked():
    with pytest.raises(ConfigError, match="max_chars=10"):
        CleanOptions(max_chars=10)
    with pytest.raises(ConfigError, match="min_spanish=7"):
        CleanOptions(min_spanish=7)
