"""The first process of a virtual machine: furnishes its namespaces, then waits and reaps what is left to it.

Started by `lab.py` under `unshare` as `python inside.py FURNITURE.json`. Says "ready" on stdout, and ends with its
stdin: whatever becomes of the test, the kernel then ends every process of the machine and takes its network away.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    furniture = json.loads(Path(sys.argv[1]).read_text())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if furniture["name"]:
        socket.sethostname(furniture["name"])
    for kind, source, target in furniture["mounts"]:
        how = ["--bind", source] if kind == "bind" else ["-t", kind, kind]
        subprocess.run(["mount", *how, target], check=True)
    for folder in furniture["folders"]:
        Path(folder).mkdir(parents=True, exist_ok=True)
    for program in furniture["programs"]:
        subprocess.Popen(program, stdin=subprocess.DEVNULL)
    threading.Thread(target=_leave_with_stdin, daemon=True).start()
    print("ready", flush=True)
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
            continue
        time.sleep(0.1)


def _leave_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
