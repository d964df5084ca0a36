from __future__ import annotations

import pytest

from tbf.errors import ConfigError
from tbf.train import environment
from tbf.train.environment import ProcessInfo, choose_accelerator, discover_process, set_threads

FULL = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_deepspeed_and_torchrun_state_everything():
    assert discover_process({**FULL, "LOCAL_SIZE": "2"}) == ProcessInfo(1, 1, 4, 2, "deepspeed")
    assert discover_process({**FULL, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"


def test_slurm_is_translated():
    env = {
        "SLURM_NTASKS": "5",
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_TASKS_PER_NODE": "1(x2),3",
        "SLURM_JOB_NODELIST": "node7",
        "SLURM_JOB_ID": "41",
    }
    assert discover_process(env) == ProcessInfo(4, 1, 5, 3, "srun")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", "20041")


def test_openmpi_needs_a_master_address():
    env = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    with pytest.raises(ConfigError, match="-x MASTER_ADDR"):
        discover_process(dict(env))
    assert discover_process({**env, "MASTER_ADDR": "a"}).launcher == "openmpi"


def test_plain_python_is_one_process_on_a_free_port():
    env: dict[str, str] = {}
    assert discover_process(env) == ProcessInfo(0, 0, 1, 1, "python")
    assert int(env["MASTER_PORT"]) > 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [({"MASTER_PORT": None}, "MASTER_PORT missing"), ({"RANK": "4"}, "does not lie below"), ({"RANK": "x"}, "whole")],
)
def test_a_half_set_environment_is_refused(change, words):
    env = {key: value for key, value in {**FULL, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        discover_process(env)


@pytest.mark.parametrize(
    ("launcher", "env", "expected"),
    [
        ("deepspeed", {}, 4),
        ("torchrun", {"OMP_NUM_THREADS": "1"}, 4),  # torchrun's own default, not the user's wish
        ("torchrun", {"OMP_NUM_THREADS": "3"}, 3),
        ("deepspeed", {"OMP_NUM_THREADS": "1"}, 1),
        ("torchrun", {"OMP_NUM_THREADS": "1", "TBF_NUM_THREADS": "2"}, 2),
    ],
)
def test_threads_are_the_physical_cores_shared_by_the_local_ranks(monkeypatch, launcher, env, expected):
    monkeypatch.setattr(environment.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: range(16), raising=False)
    assert set_threads(ProcessInfo(0, 0, 2, 2, launcher), env) == expected
    assert env["OMP_NUM_THREADS"] == str(expected)


def test_the_cpu_is_taken_only_on_request_or_without_a_card(monkeypatch):
    monkeypatch.setattr(environment, "has_nvidia_device", lambda: True)
    assert choose_accelerator({}) == ""
    assert "asked for" in choose_accelerator({"DS_ACCELERATOR": "cpu"})
    monkeypatch.setattr(environment, "has_nvidia_device", lambda: False)
    env: dict[str, str] = {}
    assert "no NVIDIA device" in choose_accelerator(env) and env["DS_ACCELERATOR"] == "cpu"
