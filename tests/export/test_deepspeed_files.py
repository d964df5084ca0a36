from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tbf.errors import CheckpointError
from tbf.export.deepspeed_files import DeepSpeedCheckpoint, load_file
from tbf.export.weights import load_strict
from tests.export.toy import Saved, ToyNet, save_checkpoints
from tests.helpers.gloo import run_distributed

CASES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2)]


def whole(checkpoint: DeepSpeedCheckpoint) -> dict[str, torch.Tensor]:
    """The pieces of the reference, put together; fails if any element comes twice or never."""
    shapes = {name: stored.shape for name, stored in checkpoint.weights().items()}
    values = {name: torch.full([shape.numel()], torch.nan, dtype=torch.float64) for name, shape in shapes.items()}
    for name, first, piece in checkpoint.reference_pieces():
        target = values[name][first : first + piece.numel()]
        assert target.isnan().all()
        target.copy_(piece)
    assert not any(value.isnan().any() for value in values.values())
    return {name: value.view(shapes[name]) for name, value in values.items()}


@pytest.fixture
def copied(toy_checkpoints: Saved, tmp_path: Path) -> Path:
    """A two-rank ZeRO-2 checkpoint to be damaged."""
    return Path(shutil.copytree(toy_checkpoints[2, 2][0], tmp_path / "zero2"))


@pytest.fixture
def copied_zero3(toy_checkpoints: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_checkpoints[3, 2][0], tmp_path / "zero3"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-{case[1]}ranks")
def test_both_reassemblies_equal_the_live_model(toy_checkpoints: Saved, case: tuple[int, int]) -> None:
    folder, live = toy_checkpoints[case]
    checkpoint = DeepSpeedCheckpoint(folder)
    assert (checkpoint.stage, checkpoint.world_size, checkpoint.step) == (*case, 3)
    weights = {name: stored.read() for name, stored in checkpoint.weights().items()}
    reference = whole(checkpoint)
    assert weights.keys() == reference.keys() == live.keys() - {"head.weight"}
    for name, value in weights.items():
        assert value.dtype == live[name].dtype
        assert torch.equal(value, live[name]), name
        assert torch.equal(reference[name], live[name].double()), name


@pytest.mark.parametrize("case", [(1, 2), (3, 2)], ids=["zero1", "zero3"])
def test_loads_strictly_into_a_plain_model_with_its_ties(toy_checkpoints: Saved, case: tuple[int, int]) -> None:
    folder, live = toy_checkpoints[case]
    net = ToyNet()
    load_strict(net, {name: stored.read() for name, stored in DeepSpeedCheckpoint(folder).weights().items()}, folder)
    assert net.head.weight is net.table.weight
    assert all(torch.equal(value, live[name]) for name, value in net.state_dict().items())


def test_weights_agree_with_deepspeeds_own_merge(toy_checkpoints: Saved) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage in (2, 3):
        folder, _ = toy_checkpoints[stage, 2]
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        for name, stored in DeepSpeedCheckpoint(folder).weights().items():
            assert torch.equal(stored.read(), theirs[name]), (stage, name)


def test_reading_imports_no_deepspeed(toy_checkpoints: Saved) -> None:
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from tbf.export.deepspeed_files import DeepSpeedCheckpoint\n"
        "for folder in sys.argv[1:]:\n"
        "    print(len({name for name, *_ in DeepSpeedCheckpoint(folder).reference_pieces()}))\n"
    )
    folders = [str(toy_checkpoints[case][0]) for case in CASES]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["8"] * len(CASES), done.stderr


def test_opening_reads_no_weights(toy_checkpoints: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(k) or original(*a, **k))
    DeepSpeedCheckpoint(toy_checkpoints[3, 2][0])
    assert len(opened) == 4
    assert all(options["mmap"] and options["weights_only"] for options in opened)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_malicious_pickle_is_refused(copied: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(copied / name, weights_only=False)
    torch.save({**content, "extra": Evil()}, copied / name)
    monkeypatch.chdir(copied)
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        DeepSpeedCheckpoint(copied)
    assert not Path("pwned").exists()


def test_bare_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        load_file(tmp_path / "mp_rank_00_model_states.pt")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_truncated_file(copied: Path, name: str, kept: float) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=f"{name}.*cut short or damaged"):
        DeepSpeedCheckpoint(copied)


def test_file_that_is_another_archive(copied: Path) -> None:
    with zipfile.ZipFile(copied / "mp_rank_00_model_states.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="mp_rank_00_model_states"):
        DeepSpeedCheckpoint(copied)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_missing_rank_is_named(copied_zero3: Path, rank: int, kind: str) -> None:
    (copied_zero3 / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt").unlink()
    with pytest.raises(CheckpointError, match=f"lacks the files of rank {rank} of 2"):
        DeepSpeedCheckpoint(copied_zero3)


def test_missing_model_file(copied: Path) -> None:
    (copied / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no \*_model_states\.pt"):
        DeepSpeedCheckpoint(copied)


def test_zero2_without_optimizer_files_still_gives_weights(copied: Path, toy_checkpoints: Saved) -> None:
    for path in copied.glob("*_optim_states.pt"):
        path.unlink()
    checkpoint = DeepSpeedCheckpoint(copied)
    live = toy_checkpoints[2, 2][1]
    assert all(torch.equal(stored.read(), live[name]) for name, stored in checkpoint.weights().items())
    with pytest.raises(CheckpointError, match="--no-verify"):
        next(checkpoint.reference_pieces())


def test_zero3_without_optimizer_files_is_refused(copied_zero3: Path) -> None:
    for path in copied_zero3.glob("*_optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="ZeRO-3 without"):
        DeepSpeedCheckpoint(copied_zero3)


def test_shards_of_different_steps_are_refused(copied: Path) -> None:
    path = copied / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"different steps \(3, 4\)"):
        DeepSpeedCheckpoint(copied)


def test_mixed_stages_are_refused(copied: Path, copied_zero3: Path) -> None:
    shutil.copy(copied_zero3 / "zero_pp_rank_0_mp_rank_00_model_states.pt", copied)
    with pytest.raises(CheckpointError, match="mixes files"):
        DeepSpeedCheckpoint(copied)


def test_partition_cut_short_is_refused(copied: Path) -> None:
    path = copied / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    flat = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flat[0] = flat[0][:-5].clone()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="values too few"):
        whole(DeepSpeedCheckpoint(copied))


def test_deepspeeds_own_files_of_swapped_state_are_refused(copied_zero3: Path) -> None:
    (copied_zero3 / "offloaded_tensors" / "rank00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="swap buffers"):
        DeepSpeedCheckpoint(copied_zero3)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*_model_states\.pt"):
        DeepSpeedCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        DeepSpeedCheckpoint(tmp_path / "absent")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_offloaded_to_the_host(tmp_path: Path, stage: int) -> None:
    live = run_distributed(save_checkpoints, 2, tmp_path, (stage,), True, timeout_s=600.0)[0][stage]
    checkpoint = DeepSpeedCheckpoint(tmp_path / f"toy{stage}" / "tag")
    reference = whole(checkpoint)
    for name, stored in checkpoint.weights().items():
        assert torch.equal(stored.read(), live[name]), name
        assert torch.equal(reference[name], live[name].double()), name
