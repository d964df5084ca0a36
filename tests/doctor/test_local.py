"""The real probes, on this machine and on stand-ins for what it lacks."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tbf import cli
from tbf.doctor import disk, local, sensors
from tbf.doctor.finding import green, red, yellow
from tbf.doctor.local import LocalMachine, count_cards, merge_gpu, shorten
from tbf.doctor.machine import GIB, Gpu
from tbf.errors import EngineError
from tbf.ops import ternary_backends as backends
from tbf.system import container_limit


@pytest.fixture
def machine() -> LocalMachine:
    return LocalMachine()


def test_the_doctor_can_check_everything_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TBF_MALLOC", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = cli.main(["doctor", "--json", "--no-kernels"])
    found = json.loads(capsys.readouterr().out)
    assert code == (5 if found["count"]["red"] else 0)
    seen = {finding["name"]: finding for finding in found["findings"]}
    assert {"versions", "driver", "memory", "disk", "compiler", "host Adam", "gloo", "port"} <= set(seen)
    assert seen["gloo"]["status"] == "green" and seen["versions"]["status"] == "green"
    assert not [f for f in found["findings"] if "could not be checked" in f["seen"]]
    assert socket.gethostname() not in seen["own name"]["seen"]


def test_the_command_prints_lines_and_leaves_5_on_red(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TBF_MALLOC", "0")
    found = [green("one", "fine", "a table\nof two lines"), yellow("two", "so so", "do this")]
    monkeypatch.setattr("tbf.doctor.examine.examine", lambda machine, options: iter(found))
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "green  one            fine" and lines[4].strip() == "-> do this"
    assert lines[-1] == "0 red, 1 yellow, 1 green"
    found.append(red("three", "broken", "mend it"))
    assert cli.main(["doctor"]) == 5
    assert "\033[31mred" in found[-1].text(colour=True)
    (tmp_path / "hostfile").write_text("node1\n")
    assert cli.main(["doctor", "--hostfile", str(tmp_path / "hostfile")]) == 2
    assert cli.main(["doctor", "--port", "0"]) == 2


def test_every_card_gets_kernels_of_its_own(machine, monkeypatch):
    """The compiled kernels belong to one card's context: a second card must not be given the first one's."""
    seen = []

    def choose(device, shapes, say):
        seen.append((device.index, backends.fastest_tools.cache_info().currsize))
        backends.fastest_tools("cpu")
        say("ternary kernels on it: some plan\n  * forward  some")
        return "some plan"

    monkeypatch.setattr(local, "choose_plan", choose)
    monkeypatch.setattr(local, "device_name", lambda device: "Tesla P40")
    monkeypatch.setattr(local.torch.cuda, "set_device", lambda device: None)
    expected = ("some plan (preset mini, Tesla P40)", "  * forward  some")
    assert [machine.kernels(card) for card in (0, 1)] == [expected] * 2
    assert seen == [(0, 0), (1, 0)]


def test_commands_end_and_answer(machine):
    answer = machine.run([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr)"], 30)
    assert (answer.code, answer.output) == (0, "err\nout\n")
    assert machine.run(["no-such-program"], 30).code == 127
    assert machine.run([sys.executable, "-c", "import time; time.sleep(30)"], 0.2).code == 124


def test_ports(machine):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert machine.port_taken(port)
    assert not machine.port_taken(port)


def test_ninja_is_found_beside_the_interpreter(machine, monkeypatch):
    beside = Path(sys.executable).parent / "ninja"
    if not beside.exists():
        pytest.skip("ninja is not a package of this environment")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert machine.which("ninja") == str(beside)


def test_operators_and_their_locks(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert machine.operators().compiled == machine.operators().locks == ()
    for name in ("cpu_adam", "async_io"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    (tmp_path / "async_io" / "lock").touch()
    os.utime(tmp_path / "async_io" / "lock", (time.time() - 3600,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = machine.operators()
    assert found.compiled == ("cpu_adam",)
    ((path, age),) = found.locks
    assert path.endswith("async_io/lock") and age == pytest.approx(3600, abs=60)


def test_memory_and_limits_are_plausible(machine):
    memory = machine.memory()
    assert 0 < memory.available <= memory.total and memory.swapped <= memory.swap
    assert machine.limit("nofile") is None or machine.limit("nofile") > 0
    assert machine.processor().threads >= 1


@pytest.mark.parametrize(("text", "limit"), [("8589934592\n", 8 * GIB), ("max\n", None), ("9223372036854771712", None)])
def test_the_limit_of_a_container(tmp_path, text, limit):
    (tmp_path / "memory.max").write_text(text)
    assert container_limit([str(tmp_path / "absent"), str(tmp_path / "memory.max")]) == limit


def test_cards_on_the_bus(tmp_path):
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1af4", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "unreadable").mkdir()
    assert count_cards(tmp_path) == 1  # the second is the card's sound, the third a virtual display


def test_paths_are_shown_without_the_home_folder(monkeypatch):
    monkeypatch.setattr(local.Path, "home", lambda: Path("/home/somebody"))
    assert shorten(Path("/home/somebody/.cache/tbf")) == "~/.cache/tbf"
    assert shorten(Path("/home/somebodyelse/x")) == "/home/somebodyelse/x"


def test_disk_speed(tmp_path):
    speed = disk.disk_speed(tmp_path, block=os.sysconf("SC_PAGE_SIZE"), blocks=16)
    assert speed.write > 0 and speed.read > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        disk.disk_speed(tmp_path / "absent")
    with pytest.raises(OSError, match="No space"):
        disk.disk_speed(tmp_path, block=1 << 40, blocks=1 << 20)


def test_disk_speed_without_direct_access(tmp_path, monkeypatch):
    real, asked = disk._measure, []

    def measure(name, block, blocks, direct):
        asked.append(direct)
        if direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, block, blocks, direct)

    monkeypatch.setattr(disk, "DIRECT", 1)
    monkeypatch.setattr(disk, "_measure", measure)
    assert not disk.disk_speed(tmp_path, block=4096, blocks=2).direct
    assert asked == [1, 0] and not list(tmp_path.iterdir())


def test_versions_need_no_torch():
    code = (
        "import sys; from tbf.doctor.versions import main; main()\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] and found["cards"] >= 0 and abs(found["time"] - time.time()) < 60


class FakeNvml:
    """pynvml with a P40 and a card that has neither ECC nor sensors of the link."""

    NVML_TEMPERATURE_GPU, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, driver: bool = True) -> None:
        self.driver, self.open = driver, 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return b"580.95.05"  # bytes in older releases

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-0000-{handle}"

    def nvmlDeviceGetName(self, handle):
        return ("Tesla P40", "NVIDIA TITAN")[handle]

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (6, 1)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=24 * GIB, used=GIB)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 51

    def _only_first(self, handle, *arguments):
        if handle:
            raise self.NVMLError("Not Supported")
        return 16

    nvmlDeviceGetCurrPcieLinkWidth = nvmlDeviceGetMaxPcieLinkWidth = _only_first
    nvmlDeviceGetMaxPcieLinkGeneration = nvmlDeviceGetTotalEccErrors = _only_first

    def nvmlDeviceGetEccMode(self, handle):
        self._only_first(handle)
        return [1, 1]


def test_cards_through_nvml():
    nvml = FakeNvml()
    first, second = sensors.read(nvml).values()
    assert first == Gpu("Tesla P40", (6, 1), 24 * GIB, GIB, 51, 16, 16, 16, True, 16)
    assert second == Gpu("NVIDIA TITAN", (6, 1), 24 * GIB, GIB, 51)
    assert sensors.driver(nvml) == "580.95.05" and nvml.open == 0
    none = FakeNvml(driver=False)
    assert sensors.read(none) == {} and sensors.driver(none) is None


def test_torch_and_nvml_speak_of_the_same_card():
    seen = sensors.read(FakeNvml())
    properties = SimpleNamespace(name="Tesla P40", major=6, minor=1, total_memory=23 * GIB, uuid="0000-0")
    assert merge_gpu(properties, seen).temperature == 51
    properties.uuid = "elsewhere"
    assert merge_gpu(properties, seen) == Gpu("Tesla P40", (6, 1), 23 * GIB)


def test_a_build_without_end_is_given_up(machine, monkeypatch):
    monkeypatch.setattr(local, "LONGEST_BUILD", 0.01)
    with pytest.raises(EngineError, match="still compiling"):
        machine.build_host_adam()


@pytest.mark.slow
def test_the_host_adam_is_built_for_real(machine, monkeypatch):
    assert machine.build_host_adam() > 0
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(EngineError, match="cpu_adam"):
        machine.build_host_adam()
