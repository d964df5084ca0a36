"""Trains tokenizers on corpora of any size, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from tbf.data.plan import PrepareOptions, list_sources, parse_sources
from tbf.data.readers import read_part
from tbf.data.sources import Problems
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError

SAMPLE_GB = 1.0
"""Text that a tokenizer is trained on; words beyond it change little."""
PROBES = {
    "numbers": "3.141,59 € y 1,234,567.89; el 20 % de 2026; tel. +34 600-123-456",
    "accents": "¿Qué tal, pingüino? ÁÉÍÓÚÜÑ áéíóúüñ ¡Añoranza! Sarmiño",
    "emoji": "😂🤣 🇪🇸 👩‍👩‍👧‍👦 ❤️ 👍🏽",
    "URLs": "https://ejemplo.es/ruta/ñ?q=café&p=1#fin maría.lópez@correo.com.mx",
}
"""Texts that must come back exactly."""
EVALUATION_BYTES = 20_000_000
DEFAULTS = PrepareOptions()


@dataclass(frozen=True)
class TokenizerScore:
    """How well a tokenizer fits a text."""

    name: str
    vocab_size: int
    words: int
    text_bytes: int
    tokens: int
    fertility: float
    """Tokens per word."""
    bytes_per_token: float
    unknown_rate: float
    """Share of tokens that are [UNK]."""
    byte_rate: float
    """Share of tokens that are single bytes of characters outside the vocabulary."""
    round_trips: dict[str, bool]
    """Per probe: does it come back exactly?"""


def sample_texts(
    sources: Sequence[tuple[str, float | None]],
    options: PrepareOptions,
    sample_bytes: int,
    problems: Problems | None = None,
) -> Iterator[str]:
    """Streams about `sample_bytes` of text, spread over the sources' parts; `problems` collects what is unreadable.

    Raises DataError when there is no text.
    """
    problems = problems or Problems(options.strict)
    listed, _ = list_sources(sources, options, problems)
    parts = [part for source in listed for part in source.parts]
    step = max(1, sum(part.text_bytes for part in parts) // max(1, sample_bytes))
    taken = 0
    for part in parts[::step]:
        for text in read_part(part, problems):
            taken += len(text.encode("utf-8", "ignore"))
            yield text
            if taken >= sample_bytes:
                return
    if not taken:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(problems.files.items())[:3])
        raise DataError(f"{sources[0][0]}: no text in it ({reasons or 'the source is blank'})")


def train_tokenizer(
    sources: str | Sequence[tuple[str, float | None]],
    out: str | Path,
    *,
    vocab_size: int = 50_000,
    model_type: str = "unigram",
    sample_gb: float = SAMPLE_GB,
    options: PrepareOptions = DEFAULTS,
    problems: Problems | None = None,
) -> SpanishSPMTokenizer:
    """What `tbf tokenizer train` does: trains on a sample of `sources` and saves into `out`.

    The same sources give the same tokenizer. Memory is bounded by the number of different words kept.
    """
    pairs = parse_sources(sources) if isinstance(sources, str) else list(sources)
    texts = sample_texts(pairs, options, int(sample_gb * 1e9), problems)
    tokenizer = SpanishSPMTokenizer.train(texts, vocab_size, model_type)
    tokenizer.save_pretrained(out)
    return tokenizer


def evaluate_tokenizers(
    tokenizers: Sequence[str | Path],
    sources: str | Sequence[tuple[str, float | None]],
    *,
    text_bytes: int = EVALUATION_BYTES,
    options: PrepareOptions = DEFAULTS,
    problems: Problems | None = None,
) -> list[TokenizerScore]:
    """What `tbf tokenizer eval` does: scores tokenizers on the same text of `sources`.

    Args:
        tokenizers: folders of tbf, any SentencePiece `.model`, or a `tokenizer.json`.

    Raises:
        DataError: a tokenizer or a source cannot be read.
    """
    pairs = parse_sources(sources) if isinstance(sources, str) else list(sources)
    return score_texts(tokenizers, list(sample_texts(pairs, options, text_bytes, problems)))


def score_texts(tokenizers: Sequence[str | Path], texts: Sequence[str]) -> list[TokenizerScore]:
    """Scores tokenizers, as `evaluate_tokenizers` takes them, on these texts."""
    loaded = [_load(Path(path)) for path in tokenizers]  # all of them first: a wrong path must not cost minutes
    return [_score(str(path), tokenizer, texts) for path, tokenizer in zip(tokenizers, loaded)]


@dataclass(frozen=True)
class _Loaded:
    """What all kinds of tokenizers can do."""

    vocab_size: int
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    unknown: int
    byte_ids: frozenset[int]


def _load(path: Path) -> _Loaded:
    if path.suffix == ".json":
        return _load_json(path)
    if path.is_dir() and not (path / "tokenizer.model").exists() and (path / "tokenizer.json").exists():
        return _load_json(path / "tokenizer.json")
    if path.suffix == ".model":
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: no SentencePiece model ({str(error).strip()}); give a .model file") from None
        byte_ids = frozenset(i for i in range(sp.vocab_size()) if sp.is_byte(i))
        return _Loaded(sp.vocab_size(), lambda texts: sp.encode(texts, num_threads=1), sp.decode, sp.unk_id(), byte_ids)
    own = SpanishSPMTokenizer.from_pretrained(path)
    byte_ids = frozenset(own.byte_tokens().nonzero()[0].tolist())
    return _Loaded(own.vocab_size, own.encode_ids, lambda ids: str(own.decode(ids)), own.unk_id, byte_ids)


def _load_json(path: Path) -> _Loaded:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(f'{path}: reading it needs the extra: pip install "tbf[hf]"') from None
    try:
        other = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer.json ({error})") from None
    vocabulary = other.get_vocab()
    unknown = next((vocabulary[name] for name in ("[UNK]", "<unk>") if name in vocabulary), -1)
    byte_ids = frozenset(i for name, i in vocabulary.items() if len(name) == 6 and name.startswith("<0x"))
    return _Loaded(
        other.get_vocab_size(),
        lambda texts: [e.ids for e in other.encode_batch(texts, add_special_tokens=False)],
        other.decode,
        unknown,
        byte_ids,
    )


def _score(name: str, tokenizer: _Loaded, texts: Sequence[str]) -> TokenizerScore:
    words = tokens = size = unknown = spelled = 0
    for start in range(0, len(texts), 256):
        batch = list(texts[start : start + 256])
        for text, ids in zip(batch, tokenizer.encode(batch)):
            words += len(text.split())
            size += len(text.encode("utf-8"))
            tokens += len(ids)
            unknown += ids.count(tokenizer.unknown)
            spelled += sum(map(tokenizer.byte_ids.__contains__, ids))
    return TokenizerScore(
        name,
        tokenizer.vocab_size,
        words,
        size,
        tokens,
        tokens / max(1, words),
        size / max(1, tokens),
        unknown / max(1, tokens),
        spelled / max(1, tokens),
        {probe: tokenizer.decode(tokenizer.encode([text])[0]).strip() == text for probe, text in PROBES.items()},
    )


def format_scores(scores: Sequence[TokenizerScore]) -> str:
    """A table for people; fewer tokens per word and more bytes per token are better.

    `bytes` is the share of tokens that are single bytes.
    """
    width = max(len("tokenizer"), *(len(score.name) for score in scores))
    lines = [
        f"on {scores[0].words:,} words, {scores[0].text_bytes / 1e6:,.2f} MB of text",
        f"{'tokenizer':<{width}}  {'ids':>7}  tokens/word  bytes/token  unknown   bytes  exact round trip",
    ]
    for score in scores:
        failed = ", ".join(probe for probe, exact in score.round_trips.items() if not exact)
        lines.append(
            f"{score.name:<{width}}  {score.vocab_size:>7,}  {score.fertility:>11.3f}  {score.bytes_per_token:>11.3f}"
            f"  {score.unknown_rate:>7.3%}  {score.byte_rate:>6.3%}  {f'not {failed}' if failed else 'all'}"
        )
    return "\n".join(lines)
