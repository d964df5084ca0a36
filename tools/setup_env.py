"""Creates the virtual environment that `make train` and `make test` use. Needs only the system's Python >= 3.10.

    python3 tools/setup_env.py --venv .venv

Which torch it takes, by what the machine shows (override with TORCH, e.g. TORCH=torch==2.14.1, and TORCH_INDEX, the
index address that PyTorch's installation page gives for a platform, e.g. for its CPU-only or CUDA 12.6 builds):
  no NVIDIA card          torch 2.13.0; without TORCH_INDEX x86-64 Linux gets the default build, which runs on a CPU too
  Pascal or Volta card    torch 2.7.1, the last release on the default index that carries their kernels
  newer card              torch 2.13.0
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAST_PASCAL_TORCH, CURRENT_TORCH = "torch==2.7.1", "torch==2.13.0"


def lowest_capability() -> float | None:
    """Compute capability of the oldest NVIDIA card, or None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    capabilities = [float(line) for line in answer.stdout.split() if line.replace(".", "", 1).isdigit()]
    return min(capabilities, default=None)


def choose_torch(capability: float | None) -> tuple[str, str]:
    """Returns the requirement for torch and the reason."""
    if os.environ.get("TORCH"):
        return os.environ["TORCH"], "asked for by TORCH"
    if capability is None:
        return CURRENT_TORCH, "no NVIDIA card here: runs on the CPU"
    if capability < 7.5:
        return LAST_PASCAL_TORCH, f"the card's compute capability {capability} needs a release that carries its kernels"
    return CURRENT_TORCH, f"compute capability {capability}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Create the virtual environment of tbf.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder to create (default: .venv)")
    folder = parser.parse_args().venv
    if sys.version_info < (3, 10):  # noqa: UP036 - the message is for those who run an older one
        print(f"error: Python {sys.version.split()[0]} is too old; tbf needs 3.10 or newer", file=sys.stderr)
        return 2
    if not (folder / "bin" / "pip").exists():
        try:
            venv.create(folder, with_pip=True, clear=folder.exists())
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"error: cannot create {folder} ({error}); on Debian: apt install python3-venv", file=sys.stderr)
            return 2
    capability = lowest_capability()
    requirement, reason = choose_torch(capability)
    extras = "dev" if capability is not None else "dev,kernels"
    print(f"installing {requirement} ({reason}), then tbf", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    constraint = folder / "torch-constraint.txt"
    constraint.write_text(f"{requirement}\n")
    for command in ([*pip, *index, requirement], [*pip, "-c", str(constraint), "-e", f"{ROOT}[{extras}]"]):
        if subprocess.run(command, check=False).returncode:
            print(f"error: this failed: {' '.join(command)}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
