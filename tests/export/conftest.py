from __future__ import annotations

import pytest

from tests.export.toy import Saved, save_checkpoints
from tests.helpers.gloo import run_distributed


@pytest.fixture(scope="session")
def toy_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(ZeRO stage, ranks) -> (checkpoint folder, weights of the model that it was saved from)."""
    saved = {}
    for world_size in (1, 2):
        root = tmp_path_factory.mktemp(f"ranks{world_size}")
        live = run_distributed(save_checkpoints, world_size, root, (1, 2, 3))[0]
        saved.update({(stage, world_size): (root / f"zero{stage}" / "tag", live[stage]) for stage in live})
    return saved
