"""What a Hugging Face folder holds beside the plain export: settings of its tokenizer, sentence-transformers' modules
and a model card.

The weights and config.json are those of a plain export, so `load_pretrained` opens the folder too. Writing it needs
neither transformers nor sentence-transformers; reading it with them needs `import tbf.hf`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tbf.export.source import ExportSource
from tbf.model.config import UltraConfig

ARCHITECTURE = "TbfForMaskedLM"
CARD_NAME = "README.md"
DEFAULT_LENGTH = 512


def write_hf_files(folder: Path, source: ExportSource) -> None:
    """Adds to a plain export, tokenizer included, what transformers and sentence-transformers look for."""
    length = source.origin["data"].get("seq_len") or DEFAULT_LENGTH
    tokenizer = folder / "tokenizer_config.json"
    if not tokenizer.is_file():  # exported without: the model alone can still be loaded
        return
    kept = {"sha256": json.loads(tokenizer.read_text(encoding="utf-8"))["sha256"]}
    _write_json(tokenizer, {"tokenizer_class": "TbfTokenizer", "model_max_length": length, **kept})
    _write_json(folder / "modules.json", [_module(0, "Transformer", ""), _module(1, "Pooling", "1_Pooling")])
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": source.config.hidden_size,
        "pooling_mode_cls_token": source.config.pooling == "cls",
        "pooling_mode_mean_tokens": source.config.pooling == "mean",
    }
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def write_card(folder: Path, facts: dict[str, Any], config: UltraConfig, license: str | None) -> None:
    """Writes the model card from what export.json says. `license`: an identifier such as apache-2.0, or None."""
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        *([f"license: {license}"] if license else []),
        "tags: [tbf, masked-lm, sentence-transformers, ternary]" if config.use_bitnet else "tags: [tbf, masked-lm]",
        "---",
    ]
    rows = [f"| {name} | {value} |" for name, value in _card_rows(facts, config, license) if value is not None]
    text = _CARD.format(name=facts.get("run") or facts.get("preset") or "tbf encoder", rows="\n".join(rows))
    (folder / CARD_NAME).write_text("\n".join(header) + "\n" + text, encoding="utf-8")


def _card_rows(facts: dict[str, Any], config: UltraConfig, license: str | None) -> list[tuple[str, Any]]:
    data, loss = facts.get("data") or {}, "nats per masked token"
    engine = facts["engine"]
    mixers = ", ".join(dict.fromkeys(name for name, _ in config.layer_types))
    proof = "not verified"
    if verified := facts.get("verified"):
        proof = f"logits differ by at most {verified['logits_max_abs_error']:.0e}"
    return [
        ("architecture", f"{config.num_layers} layers of width {config.hidden_size}, visited {config.num_loops}x"),
        ("mixers", mixers),
        ("parameters", f"{facts['parameters']:,}"),
        ("projections", "ternary weights, int8 activations" if config.use_bitnet else "FP32"),
        ("vocabulary", f"{config.vocab_size:,} SentencePiece tokens"),
        ("data", _code(data.get("source"))),
        ("tokens per row", data.get("seq_len")),
        ("masked", f"{data['mask_rate']:.0%}" if data.get("mask_rate") else None),
        ("steps", f"{facts['step']:,}"),
        ("tokens seen", f"{facts['tokens']:,}" if facts.get("tokens") else None),
        ("training loss", f"{facts['train_loss']:.3f} {loss}" if facts.get("train_loss") is not None else None),
        ("validation loss", f"{facts['val_loss']:.3f} {loss}" if facts.get("val_loss") is not None else None),
        ("hardware", _hardware(facts.get("hardware"))),
        (
            "engine",
            f"DeepSpeed {engine['deepspeed']}, ZeRO-{engine['zero_stage']}, {engine['world_size']} rank(s), FP32",
        ),
        ("tbf", facts["tbf_version"]),
        ("conversion", proof),
        ("licence", license or "not stated: ask whoever trained it"),
    ]


def _hardware(hardware: dict[str, Any] | None) -> str | None:
    if not hardware:
        return None
    gpus = hardware.get("gpus") or []
    cards = ", ".join(f"{gpus.count(name)}x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    return f"{cards}; {hardware.get('cpu_cores')} CPU cores, {hardware.get('host_memory_gb')} GB"


def _code(value: Any) -> str | None:
    """In back quotes, and unable to end the table's cell."""
    return None if value is None else "`" + str(value).replace("`", "'").replace("|", "/").replace("\n", " ") + "`"


def _module(index: int, name: str, path: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_CARD = """
# {name}

A bidirectional masked-language-model encoder, pretrained and exported with tbf (Tormented-BERT-Frankenstein). This card
was written from the run's own records; nothing in it was measured on downstream tasks.

| | |
|---|---|
{rows}

## Use

The architecture is part of tbf, so no code is loaded from this folder:

```python
import tbf.hf  # registers the architecture
from transformers import pipeline

pipeline("fill-mask", "PATH")("La capital de España es [MASK].")
```

```python
import tbf.hf
from sentence_transformers import SentenceTransformer

SentenceTransformer("PATH").encode(["Una frase.", "Otra frase."])
```

Sentence vectors are pooled hidden states of a model that was trained to fill masks: fine-tune them before you rely on
their distances.

## Limits

The model repeats what its training text says, errors and prejudices included. Look at what it does with your own text
before you put it to use, above all where people are affected.
"""
