from __future__ import annotations

import json
from pathlib import Path

import pytest

from tbf.export.hf import ARCHITECTURE, write_hf_files
from tbf.export.source import ExportSource
from tests.export.tiny_runs import tiny_tokenizer, write_export

pytest.importorskip("transformers")


def hf_export(folder: Path, pooling: str = "mean") -> Path:
    """What the converter writes in the format hf, of an untrained model and without a card."""
    write_export(folder, tiny_tokenizer(), pooling=pooling)
    config = folder / "config.json"
    meta = {"model_type": "tbf", "architectures": [ARCHITECTURE]}
    config.write_text(json.dumps({**meta, **json.loads(config.read_text())}))
    from tbf.export.source import read_config

    write_hf_files(folder, ExportSource(folder, read_config(config), folder, {"data": {"seq_len": 64}}))
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never to be changed: copy first."""
    return hf_export(tmp_path_factory.mktemp("hf") / "exported")
