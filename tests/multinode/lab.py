"""Several machines inside this one: each has its own network, processes, name, home and files.

A machine is a set of Linux namespaces that live as long as its first process (`inside.py`), which lives as long as the
test: nothing is left on the real machine, not even after a kill. The machines hang on one switch, or on two that a slow
`Cable` joins. They see the real machine's programs and this clone at the same paths, as multi-node jobs demand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from tbf.system import cache_root
from tbf.train.build_ops import extensions_dir

HERE = Path(__file__).resolve().parent
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")


@dataclass(frozen=True)
class Cable:
    """Seconds that a frame takes, and bits that pass in a second, each way. Without delay the kernel holds the rate of
    each host but the first, at any speed; `cable.py`, which makes the delay, is good for some 200 Mbit/s."""

    delay: float = 0.0
    rate: float = 1e9


@cache
def missing(*programs: str) -> str:
    """Why no lab can be built here, or "" when one can; `programs` are those that the test needs besides."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in (*TOOLS, *programs) if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    probe = "ip link add br0 type bridge && ip link add end0 type veth peer name end1 && mount -t tmpfs tmpfs /run"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", probe], capture_output=True, text=True
    )
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()[:200]}"


class Lab:
    """Machines named `hosts`, joined while the `with` block runs. `folder`/work is each one's own working folder.

    Host i has the address 10.77.0.(i+1) on `eth0`. With a `cable`, the first host is at its one end and the others at
    the other one.
    """

    def __init__(self, folder: Path, hosts: Sequence[str] = ("node1", "node2"), cable: Cable | None = None) -> None:
        self.folder, self.hosts, self.cable = Path(folder), tuple(hosts), cable
        self.work, self.home = self.folder / "work", self.folder / "home"
        self._machines: dict[str, tuple[subprocess.Popen, int]] = {}

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._machines):
            self.power_off(name)

    def address(self, host: str) -> str:
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def files(self, host: str) -> Path:
        """Where the host's working folder lies on the real machine."""
        return self.folder / host / "work"

    def start(self, host: str, command: Sequence[object], **env: str) -> subprocess.Popen:
        """Starts a program on a host, in its working folder; output and errors together on `stdout`."""
        line = ["nsenter", "--all", "--target", str(self._machines[host][1]), f"--wdns={self.work}", *map(str, command)]
        return subprocess.Popen(
            line, env=self.environment(**env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, host: str, command: Sequence[object], timeout: float = 180.0, **env: str) -> tuple[int, str]:
        """Exit code and output of a program on a host."""
        process = self.start(host, command, **env)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()  # ends nsenter; what runs inside ends with its machine
            raise
        return process.returncode, output

    def environment(self, **extra: str) -> dict[str, str]:
        """What a login on any of the hosts gets."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", **settings(), **extra}

    def processes(self, host: str, containing: str) -> list[str]:
        """Command lines of the host's living processes that contain a text."""
        found = []
        for process in self._tree(host):
            try:
                line = " ".join(process.cmdline())
                if containing in line and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(line)
            except psutil.Error:
                continue
        return found

    def pids(self, host: str, containing: str) -> list[int]:
        """The same as process ids of the real machine, so that a test can send signals."""
        return [p.pid for p in self._tree(host) if containing in " ".join(p.cmdline())]

    def unplug(self, host: str) -> None:
        """Pulls the host's network cable: no packet and no error passes."""
        self._switch("link", "set", f"to-{host}", "down")

    def plug(self, host: str) -> None:
        self._switch("link", "set", f"to-{host}", "up")

    def sent(self, host: str) -> int:
        """Bytes that the host has sent, headers included."""
        shown = self.run(host, ["cat", "/proc/net/dev"])[1]  # /sys shows the real machine's cards
        return int(shown.partition("eth0:")[2].split()[8])

    def power_off(self, host: str) -> None:
        """Ends all of a host's processes at once, and its network: the others hear nothing more of it."""
        process, first = self._machines.pop(host)
        os.kill(first, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def power_on(self, host: str) -> None:
        self._boot(host)
        self._connect(host)

    def _build(self) -> None:
        self._write_home()
        self._start("switch", [], [])
        self._switch("link", "add", "near", "type", "bridge")
        self._switch("link", "set", "near", "up")
        for host in self.hosts:
            self.power_on(host)
        if self.cable and self.cable.delay:
            self._lay_cable(self.cable)

    def _lay_cable(self, cable: Cable) -> None:
        """Moves all but the first host to a second switch; the kernel cuts large packets up before a TAP device."""
        self._switch("link", "add", "far", "type", "bridge")
        self._switch("link", "set", "far", "up")
        program = [sys.executable, str(HERE / "cable.py"), "cable-near", "cable-far", str(cable.delay), str(cable.rate)]
        line = ["nsenter", "--all", "--target", str(self._machines["switch"][1]), *program]
        carrier = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert carrier.stdout.readline() == "ready\n"
        carrier.stdout.close()
        self._carrier = carrier
        for end in ("near", "far"):
            self._switch("link", "set", f"cable-{end}", "master", end)
            self._switch("link", "set", f"cable-{end}", "up")
        for host in self.hosts[1:]:
            self._switch("link", "set", f"to-{host}", "master", "far")

    def _boot(self, host: str) -> None:
        own = self.folder / host
        for name in ("home", "work"):
            (own / name).mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.folder / "skeleton", own / "home", dirs_exist_ok=True)
        mounts = [("tmpfs", "", "/run"), ("bind", own / "home", self.home), ("bind", own / "work", self.work)]
        mounts += [("bind", self.folder / "etc" / name, f"/etc/{name}") for name in ("hosts", "passwd", "shadow")]
        ternary = self.home / ".cache" / "tbf" / "ternary"
        if (cache_root() / "ternary").is_dir():  # compiled for this processor, which all hosts share
            (own / "home" / ".cache" / "tbf" / "ternary").mkdir(parents=True, exist_ok=True)
            mounts.append(("bind", cache_root() / "ternary", ternary))
        sshd = shutil.which("sshd")
        self._start(host, mounts, [[sshd, "-D", "-f", str(self.folder / "etc" / "sshd_config")]] if sshd else [])

    def _start(self, name: str, mounts: Sequence[tuple], programs: Sequence[Sequence[str]]) -> None:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        description = self.folder / name / "furniture.json"
        furniture = {"name": name, "mounts": mounts, "folders": ["/run/sshd"] * bool(mounts), "programs": programs}
        description.write_text(json.dumps(furniture, default=str))
        log = (self.folder / name / "log.txt").open("a")
        line = ["unshare", *NAMESPACES, "--fork", "--mount-proc", sys.executable, str(HERE / "inside.py"), description]
        with log:
            process = subprocess.Popen(
                line, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        ready = process.stdout.readline()
        assert ready == "ready\n", (self.folder / name / "log.txt").read_text()
        self._machines[name] = (process, psutil.Process(process.pid).children()[0].pid)

    def _connect(self, host: str) -> None:
        first = str(self._machines[host][1])
        port, number = f"to-{host}", self.hosts.index(host) + 1
        card = ["peer", "name", "eth0", "address", f"02:00:00:00:00:{number:02x}"]  # the same after a reboot
        self._switch("link", "add", port, "type", "veth", *card, "netns", first)
        far = self.cable and host != self.hosts[0] and hasattr(self, "_carrier")
        self._switch("link", "set", port, "master", "far" if far else "near")
        self._switch("link", "set", port, "up")
        for words in (["addr", "add", f"{self.address(host)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _call(["nsenter", "--all", "--target", first, "ip", *words])
        if self.cable and not self.cable.delay and host != self.hosts[0]:
            limit = ["root", "tbf", "rate", f"{self.cable.rate:.0f}bit", "burst", "128kb", "latency", "100ms"]
            _call(["nsenter", "--all", "--target", first, "tc", "qdisc", "add", "dev", "eth0", *limit])
            switch = str(self._machines["switch"][1])
            _call(["nsenter", "--net", "--target", switch, "tc", "qdisc", "add", "dev", port, *limit])

    def _switch(self, *words: str) -> None:
        # nsenter is given this machine's processes: `netns PID` above means a process of the real machine.
        _call(["nsenter", "--net", "--target", str(self._machines["switch"][1]), "ip", *words])

    def _tree(self, host: str) -> list[psutil.Process]:
        """Everything in the host's process namespace."""
        own = os.readlink(f"/proc/{self._machines[host][1]}/ns/pid")  # noqa: PTH115
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own:  # noqa: PTH115
                    found.append(process)
            except OSError:
                continue
        return found

    def _write_home(self) -> None:
        """Keys, names and settings that all hosts share; nothing of the real machine's is read or changed."""
        etc, ssh = self.folder / "etc", self.folder / "skeleton" / ".ssh"
        for folder in (etc, ssh, self.home, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{self.address(host)} {host}\n" for host in self.hosts)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "passwd").write_text(
            f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:103:65534::/run/sshd:/usr/sbin/nologin\n"
            "nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
        )
        (etc / "shadow").write_text("root:*:20000:0:99999:7:::\nsshd:!:20000::::::\n")
        if shutil.which("ssh-keygen") is None:
            return
        for name in ("host_key", "id_ed25519"):
            path = (etc if name == "host_key" else ssh) / name
            if not path.exists():
                _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)])
        (ssh / "authorized_keys").write_text((ssh / "id_ed25519.pub").read_text())
        key = (etc / "host_key.pub").read_text()
        (ssh / "known_hosts").write_text("".join(f"{host},{self.address(host)} {key}" for host in self.hosts))
        variables = " ".join(f"{name}={value}" for name, value in settings().items())
        (etc / "sshd_config").write_text(
            f"HostKey {etc}/host_key\nAuthorizedKeysFile .ssh/authorized_keys\nStrictModes no\nUsePAM no\n"
            f"PermitRootLogin prohibit-password\nPidFile none\nMaxStartups 100\nSetEnv {variables}\n"
        )


def settings() -> dict[str, str]:
    """Settings of a job on these hosts: the CPU, one thread, the right network interface, operators compiled before."""
    return {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TBF_NUM_THREADS": "1",  # under torchrun OMP_NUM_THREADS=1 is not taken for a wish
        "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_EXTENSIONS_DIR": str(extensions_dir()),
        "HF_HUB_OFFLINE": "1",
    }


def until(condition, seconds: float, what: str = "it") -> float:
    """Waits for a condition; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - started


def _call(command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
