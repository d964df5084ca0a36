from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tbf.errors import HardwareError
from tbf.train import build_ops


class FakeBuilder:
    """Stands in for DeepSpeed's builder: creates the library, or fails as a compiler would."""

    NAME = "cpu_adam"

    def __init__(self, directory, fails=False):
        self.directory, self.fails, self.loads = directory, fails, 0

    def load(self, verbose):
        self.loads += 1
        assert not list(self.directory.glob("*/lock")), "a stale lock was left in the way"
        if self.fails:
            raise RuntimeError("Error building extension 'cpu_adam'\ng++: fatal error")
        (self.directory / self.NAME).mkdir(exist_ok=True)
        (self.directory / self.NAME / "cpu_adam.so").touch()


@pytest.fixture
def builder(monkeypatch, tmp_path):
    import deepspeed.accelerator

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR")
    fake = FakeBuilder(tmp_path)
    monkeypatch.setattr(
        deepspeed.accelerator, "get_accelerator", lambda: type("A", (), {"create_op_builder": lambda s, name: fake})()
    )
    return fake


def test_it_builds_once_says_so_and_removes_stale_locks(builder, tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()  # of a build that was killed
    said = []
    assert build_ops.prepare_ops(True, said.append)
    assert build_ops.prepare_ops(True, said.append)
    assert builder.loads == 2 and len([line for line in said if line.startswith("building")]) == 1


@pytest.mark.parametrize("cause", ["compiler", "build"])
def test_a_missing_compiler_or_a_failed_build_is_said_once(builder, monkeypatch, cause):
    if cause == "compiler":
        monkeypatch.setattr(build_ops.shutil, "which", lambda name: None)
    builder.fails = True
    said = []
    assert not build_ops.prepare_ops(True, said.append)
    (line,) = [line for line in said if "going on without it" in line]
    assert ("no C++ compiler" if cause == "compiler" else "g++: fatal error") in line


def test_nothing_is_built_when_nothing_is_needed(builder):
    assert build_ops.prepare_ops(False, pytest.fail) and builder.loads == 0


def test_the_lock_dies_with_its_holder(tmp_path):
    """A killed build must never hang the next one."""
    code = (
        "import sys, time; from pathlib import Path; from tbf.train.build_ops import _exclusive\n"
        "with _exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "flock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with build_ops._exclusive(path):
        assert time.monotonic() - started < 5


def test_the_cache_is_keyed_by_environment(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    first = build_ops.extensions_dir()
    monkeypatch.setattr(build_ops.sys, "prefix", "/elsewhere")
    assert build_ops.extensions_dir() != first


def use(monkeypatch, builder):
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)


@pytest.mark.parametrize("builder", [None, SimpleNamespace(is_compatible=lambda verbose: False)])
def test_nvme_offload_without_libaio_is_refused(monkeypatch, builder):
    use(monkeypatch, builder)
    with pytest.raises(HardwareError, match="install libaio-dev"):
        build_ops._require_async_io()


def test_nvme_offload_with_libaio_passes(monkeypatch):
    use(monkeypatch, SimpleNamespace(is_compatible=lambda verbose: True))
    build_ops._require_async_io()


@pytest.mark.parametrize("fails", [False, True])
def test_the_operator_for_nvme_is_built_before_the_ranks_meet_or_refused(builder, tmp_path, fails):
    builder.NAME, builder.fails, builder.is_compatible = "async_io", fails, lambda verbose: True
    if fails:
        with pytest.raises(HardwareError, match="could not be built here"):
            build_ops.prepare_ops(False, lambda text: None, needs_async_io=True)
    else:
        assert build_ops.prepare_ops(False, lambda text: None, needs_async_io=True)
        assert (tmp_path / "async_io" / "cpu_adam.so").exists()


def test_the_ninja_beside_the_interpreter_comes_before_the_systems(monkeypatch, tmp_path):
    """A login over ssh has another PATH; a second ninja would compile everything again."""
    (tmp_path / "python").touch()
    (tmp_path / "ninja").touch()
    monkeypatch.setattr(build_ops.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    for _ in range(2):
        build_ops._put_ninja_on_path()
    assert os.environ["PATH"] == f"{tmp_path}{os.pathsep}/usr/bin"
