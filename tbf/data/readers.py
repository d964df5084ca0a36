"""Reads parts of sources as streams of documents; never a whole file in memory.

A bad record is counted and skipped; a file that fails midway keeps what was read before. Nothing here cleans text.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tbf.data.sources import Part, Problems

LONGEST_LINE = 64 << 20
"""Bytes of one JSON line; longer ones are skipped and counted."""
_CHUNK = 1 << 20
_CONVERT = "convert it to UTF-8, e.g. `iconv -f ISO-8859-1 -t UTF-8 FILE > NEW`, or copy it again if it is damaged"
_ROWS = 128  # rows decoded at a time from parquet


def read_part(part: Part, problems: Problems) -> Iterator[str]:
    """Yields the documents of one part.

    Raises:
        DataError: with `problems.strict`, when the file is not what its name says.
    """
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt, "sample": _read_txt, "hf": _read_hub}
    count = 0
    before = problems.records.copy()
    for text in readers[part.kind](part, problems):
        count += 1
        yield text
    if count == 0 and part.whole and part.path not in problems.files:
        seen = problems.records - before
        why = ", ".join(f"{n} {kind}" for kind, n in sorted(seen.items())) or "it is blank"
        problems.file(part.path, f"no text in it ({why}); give a file with text")


def _read_hub(part: Part, problems: Problems) -> Iterator[str]:
    from tbf.data.hub import read_hub_part

    return read_hub_part(part, problems)


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def open_parquet(path: str | Path, column: str, problems: Problems) -> Any:
    """Opens a parquet file and checks its text column; reports the problem and returns None when it cannot be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path, page_checksum_verification=True)
        schema = table.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        problems.file(path, f"not a readable parquet file ({first_line(error)}); copy it again or delete it")
        return None
    if column not in schema.names:
        names = ", ".join(schema.names)
        problems.file(path, f"no column {column!r} (columns: {names}); name the text column, e.g. --column NAME")
        return None
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    ):
        problems.file(path, f"column {column!r} holds {kind}, not text; name the text column, e.g. --column NAME")
        return None
    return table


def _read_parquet(part: Part, problems: Problems) -> Iterator[str]:
    import pyarrow as pa

    table = open_parquet(part.path, part.column, problems)
    if table is None:
        return
    for group in range(part.start, table.metadata.num_row_groups if part.end < 0 else part.end):
        try:
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=[part.column], use_threads=False):
                values = batch.column(0)
                problems.record("null", values.null_count)
                yield from _texts(values.drop_null(), part.path, problems)
        except (pa.ArrowException, OSError) as error:
            problems.record("damaged_row_group")
            problems.file(part.path, f"damaged data ({first_line(error)}); kept what can be read, copy the file again")


def _texts(values: Any, path: str, problems: Problems) -> Iterator[str]:
    """The values of an Arrow array of text or bytes; those that are not UTF-8 are counted and left out."""
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        try:
            values.validate(full=True)
        except pa.ArrowInvalid:
            pass  # one bad value must not take its neighbours along
        else:
            yield from values.to_pylist()
            return
    for value in values.cast(pa.large_binary()).to_pylist():
        if (text := _decode(value, path, "a value", problems)) is not None:
            yield text


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _decode(value: bytes, path: str, where: str, problems: Problems) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.record("bad_encoding")
        problems.file(path, f"{where} is not UTF-8 (byte 0x{value[error.start]:02x}); {_CONVERT}")
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _open(part: Part) -> BinaryIO:
    if part.path.lower().endswith(".gz"):
        return gzip.open(part.path)  # type: ignore[return-value]
    if part.path.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(part.path, compression="zstd"), _CHUNK)
    return Path(part.path).open("rb")


def _lines(part: Part, problems: Problems, longest: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that start inside the part; lines over `longest` bytes come in pieces."""
    try:
        with _open(part) as file:
            position = part.start
            if position:  # a line that began before belongs to the part before
                file.seek(position - 1)
                while (skipped := file.readline(_CHUNK)) and not skipped.endswith(b"\n"):
                    pass
                position = file.tell()
            inside = False
            while (part.end < 0 or position < part.end or inside) and (line := file.readline(longest)):
                yield position, line
                position += len(line)
                inside = not line.endswith(b"\n")
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        problems.file(part.path, f"damaged data ({first_line(error)}); kept what came before, copy the file again")


def _read_jsonl(part: Part, problems: Problems) -> Iterator[str]:
    keys: set[str] = set()
    found = False
    inside_long = False
    for position, line in _lines(part, problems, LONGEST_LINE):
        ended = line.endswith(b"\n")
        if inside_long or (not ended and len(line) == LONGEST_LINE):
            if not inside_long:
                problems.record("line_too_long")
                problems.file(part.path, f"the line at byte {position} is over {LONGEST_LINE >> 20} MiB; split it")
            inside_long = not ended
            continue
        if not line.strip():
            problems.record("empty")
            continue
        text = _decode(line, part.path, f"the line at byte {position}", problems)
        if text is None:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.record("malformed")
            problems.file(
                part.path, f"the line at byte {position} is not JSON ({first_line(error)}); mend or delete it"
            )
            continue
        if not isinstance(record, dict) or part.column not in record:
            problems.record("missing_key")
            keys.update(record if isinstance(record, dict) else ())
            continue
        found = True
        value = record[part.column]
        if _is_text(value):
            yield value
        else:
            problems.record("null" if value is None else "bad_encoding" if isinstance(value, str) else "wrong_type")
    if not found and keys and part.path not in problems.files:
        names = ", ".join(sorted(keys)[:10])
        problems.file(part.path, f"no line has the key {part.column!r} (keys: {names}); name it, e.g. --column NAME")


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON may carry lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_txt(part: Part, problems: Problems) -> Iterator[str]:
    limit = part.document_chars
    lines: list[str] = []
    size = 0
    spoiled = False
    rest = b""
    for position, raw in _lines(part, problems, _CHUNK):
        raw = rest + raw
        rest = b""
        if not raw.endswith(b"\n") and len(raw) >= _CHUNK:  # a piece of a long line may end inside a character
            cut = max(i for i in range(len(raw) - 4, len(raw)) if raw[i] & 0xC0 != 0x80 or i == len(raw) - 4)
            raw, rest = raw[:cut], raw[cut:]
        line = _decode(raw, part.path, f"the line at byte {position}", problems)
        spoiled = spoiled or line is None
        line = line or ""
        lines.append(line)
        size += len(raw)
        blank = not line.strip()
        if (
            part.documents == "line"
            or (blank and part.documents == "block")
            or (blank and size >= limit)
            or size >= 4 * max(limit, _CHUNK // 16)
        ):
            text = "".join(lines)
            if text.strip() and not spoiled:
                yield text
            lines, size, spoiled = [], 0, False
    last = _decode(rest, part.path, "the end of the file", problems)
    text = "".join(lines) + (last or "")
    if text.strip() and not spoiled and last is not None:
        yield text
