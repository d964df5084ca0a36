from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbf.data.readers import read_part
from tbf.data.sources import Problems, ReadOptions, list_source, open_source
from tbf.errors import ConfigError, DataError

TEXTS = ["Érase una vez.", "Dos\nlíneas, ñ", "emoji 😀", "último"]


def parquet(path: Path, texts=TEXTS, column="text", row_group_size=2, **kinds) -> Path:
    pq.write_table(pa.table({column: pa.array(texts, **kinds)}), path, row_group_size=row_group_size)
    return path


def jsonl(path: Path, texts=TEXTS) -> Path:
    path.write_text("\n".join(json.dumps({"id": 1, "text": t}) for t in texts), encoding="utf-8")
    return path


def zstd(path: Path, data: bytes) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(data)
    return path


def test_sample_is_complete():
    texts = list(open_source("sample"))
    assert len(texts) > 50
    words = sum(len(t.split()) for t in texts)
    assert 35_000 < words < 37_000


def test_formats_give_the_same_texts(tmp_path):
    files = [parquet(tmp_path / "a.parquet"), jsonl(tmp_path / "a.jsonl")]
    data = files[1].read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    files += [tmp_path / "a.jsonl.gz", zstd(tmp_path / "a.jsonl.zst", data)]
    for file in files:
        assert list(open_source(str(file))) == TEXTS, file


def test_txt_documents(tmp_path):
    text = "uno\ndos\n\ntres\r\n\n\ncuatro"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "b.txt.gz"):
        path = str(tmp_path / name)
        assert list(open_source(path)) == [text]
        assert [t.strip() for t in open_source(path, ReadOptions(documents="line"))] == ["uno", "dos", "tres", "cuatro"]
        blocks = [t.strip() for t in open_source(path, ReadOptions(documents="block"))]
        assert blocks == ["uno\ndos", "tres", "cuatro"]
    with pytest.raises(ConfigError, match=r"'page'.*file"):
        ReadOptions(documents="page")


def test_a_long_txt_becomes_several_documents_at_blank_lines(tmp_path):
    paragraphs = [f"párrafo {i} " + "palabra " * 60 for i in range(50)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    documents = list(open_source(str(tmp_path / "a.txt")))
    assert len(documents) > 5
    assert "".join(documents) == "\n\n".join(paragraphs)
    assert all(d.startswith("párrafo") for d in documents)


def test_lines_longer_than_a_read_keep_their_characters(tmp_path):
    text = "ñ😀á" * 300_000  # 2.4 MB in one line; a read ends inside a character
    (tmp_path / "a.txt").write_text(text)
    assert "".join(open_source(str(tmp_path / "a.txt"))) == text


def test_folder_is_read_in_order_and_skips_what_is_not_data(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    parquet(tmp_path / "sub" / "b.parquet", ["b"])
    parquet(tmp_path / "a.parquet", ["a"])
    parquet(tmp_path / ".cache" / "c.parquet", ["hidden"])
    (tmp_path / "README.md").write_text("not data")
    assert list(open_source(str(tmp_path))) == ["a", "b"]
    assert list(open_source(str(tmp_path / "*.parquet"))) == ["a"]
    assert list(open_source(str(tmp_path / "**" / "*.parquet"))) == ["a", "b"]


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 1000])
@pytest.mark.parametrize("make", [jsonl, parquet])
def test_parts_cover_a_file_exactly_once(tmp_path, make, part_bytes):
    texts = [f"texto número {i} ñ" for i in range(40)]
    file = make(tmp_path / f"a.{make.__name__}", texts)
    source = list_source(str(file), part_bytes=part_bytes)
    assert part_bytes == 1000 or len(source.parts) > 3
    problems = Problems()
    assert [t for part in source.parts for t in read_part(part, problems)] == texts
    assert not problems.files


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text_types(tmp_path, kind):
    values = [t.encode() for t in TEXTS] if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else TEXTS
    assert list(open_source(str(parquet(tmp_path / "a.parquet", values, type=kind)))) == TEXTS


def test_bad_records_are_counted_and_good_ones_kept(tmp_path):
    lines = [
        '{"text": "bien"}',
        "",
        '{"text": "cortad',
        "no json",
        '{"otro": 1}',
        '{"text": null}',
        '{"text": 5}',
        '{"text": "\\ud800"}',
        "[1]",
        '{"text": "también"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    problems = Problems()
    assert list(open_source(str(tmp_path / "a.jsonl"), problems=problems)) == ["bien", "también"]
    assert problems.records == {
        "empty": 1, "malformed": 2, "missing_key": 2, "null": 1, "wrong_type": 1, "bad_encoding": 1
    }  # fmt: skip
    assert "byte 18 is not JSON" in problems.files[str(tmp_path / "a.jsonl")]
    with pytest.raises(DataError, match="not JSON"):
        list(open_source(str(tmp_path / "a.jsonl")))


def bad_sources(folder: Path) -> dict[str, tuple[Path, str]]:
    def file(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "x.pdf").touch()
    latin = "La canción del año pasado\n".encode("latin-1")
    good = parquet(folder / "good.parquet").read_bytes()
    return {
        "missing": (folder / "nothing", "no such file or folder"),
        "missing glob": (folder / "*.nope", "no such file or folder"),
        "empty file": (file("e.txt", b""), "empty"),
        "blank file": (file("b.txt", b" \n \n"), "no text in it"),
        "empty folder": (folder / "empty", "folder is empty"),
        "folder without data": (folder / "other", "1 other files"),
        "unknown kind": (file("x.docx", b"x"), "unknown kind"),
        "latin-1": (file("l.txt", latin * 3), "not UTF-8.*iconv"),
        "latin-1 jsonl": (file("l.jsonl", b'{"text": "a\xf1o"}\n'), "not UTF-8.*iconv"),
        "missing column": (
            parquet(folder / "c.parquet", column="contenido"),
            r"no column 'text' \(columns: contenido\)",
        ),
        "missing key": (file("k.jsonl", b'{"body": "x"}\n'), r"no line has the key 'text' \(keys: body\)"),
        "wrong type": (parquet(folder / "w.parquet", [[1], [2]]), "holds list.*not text"),
        "no rows": (parquet(folder / "r.parquet", [], type=pa.string()), "no rows"),
        "null rows": (parquet(folder / "n.parquet", [None, None], type=pa.string()), r"no text in it \(2 null\)"),
        "not parquet": (file("p.parquet", b"nothing of the kind"), "not a readable parquet"),
        "cut parquet": (file("t.parquet", good[: len(good) // 2]), "not a readable parquet"),
        "cut gzip": (file("g.txt.gz", gzip.compress(b"hola\n" * 9999)[:-20]), "damaged"),
        "not zstd": (file("z.txt.zst", b"hola"), "damaged"),
    }


def test_every_bad_source_names_file_and_cure(tmp_path):
    for name, (path, message) in bad_sources(tmp_path).items():
        with pytest.raises(DataError, match=message) as caught:
            list(open_source(str(path)))
        assert path.name in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert caught.value.exit_code == 3


def test_a_damaged_parquet_keeps_its_other_row_groups(tmp_path):
    path = parquet(tmp_path / "d.parquet", [f"texto {i} " * 200 for i in range(40)], row_group_size=10)
    data = bytearray(path.read_bytes())
    metadata = pq.ParquetFile(path).metadata
    start = metadata.row_group(1).column(0).data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    problems = Problems()
    assert list(open_source(str(path), problems=problems)) == [f"texto {i} " * 200 for i in range(40) if i // 10 != 1]
    assert problems.records == {"damaged_row_group": 1}
    assert "damaged" in problems.files[str(path)]


def test_identity_follows_the_content(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    before = list_source(str(path)).identity
    assert list_source(str(path)).identity == before
    path.write_text('{"text": "otro"}')
    assert list_source(str(path)).identity != before
    assert list_source(str(path), ReadOptions(documents="line")).identity != list_source(str(path)).identity
