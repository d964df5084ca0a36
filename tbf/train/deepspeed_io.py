"""How DeepSpeed reads and writes checkpoint files for us: durably, hashed, and never by running code from a file.

DeepSpeed's own loader calls `torch.load(weights_only=False)`, which executes whatever a file asks for; a hash in a
manifest beside the file does not help against someone who can rewrite both. So its pluggable checkpoint engine is
replaced by ours while a checkpoint is saved or loaded.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from tbf.checkpoints.files import FileRecord, durable_file
from tbf.checkpoints.manifest import unsafe_content
from tbf.errors import CheckpointError, first_line
from tbf.model.bitlinear import invalidate_ternary
from tbf.train.background import snapshot
from tbf.train.swapped import saved_from_disk


class DurableCheckpointEngine(TorchCheckpointEngine):
    """Writes through to the disk with a hash, loads weights only.

    A failed write is remembered in `problem` instead of raised: DeepSpeed's save ends in a barrier, and a rank that
    left it early would leave the others waiting there.
    """

    def __init__(self, later: bool = False) -> None:
        """`later` makes `save` keep a copy in host memory that `write` puts on the disk."""
        super().__init__()
        self.records: dict[str, FileRecord] = {}
        self.problem: str | None = None
        self._later = later
        self._kept: list[tuple[Any, str]] = []

    def save(self, state_dict: Any, path: str) -> None:
        state_dict = _plain(state_dict)
        if self._later:
            self._kept.append((snapshot(state_dict), path))
        else:
            self._save_now(state_dict, path)

    def write(self) -> None:
        """Writes what was kept, and lets go of it."""
        while self._kept:
            self._save_now(*self._kept.pop())

    def _save_now(self, state_dict: Any, path: str) -> None:
        target, cause = Path(path), None
        try:
            with durable_file(target) as handle:
                try:
                    torch.save(state_dict, handle)
                finally:
                    cause = handle.error
                self.records[target.name] = handle.close()
            self.problem = self.problem or unsafe_content(target)
        except (OSError, RuntimeError) as error:  # torch hides a failed write behind a RuntimeError on the archive
            reason = getattr(cause or error, "strerror", None) or first_line(error)
            self.problem = f"cannot write {target}: {reason}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises CheckpointError when the file holds anything but tensors, plain values and three known classes."""
        with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler]):
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise CheckpointError(f"{path} is refused: {first_line(error)}") from error


def _plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's number of the ZeRO stage as an int: Python 3.11.0 to 3.11.3 pickles an enumeration's member as a
    call of getattr, which no safe reader makes."""
    optimizer = state_dict.get("optimizer_state_dict")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("zero_stage"), enum.Enum):
        optimizer = {**optimizer, "zero_stage": int(optimizer["zero_stage"].value)}
        return {**state_dict, "optimizer_state_dict": optimizer}
    return state_dict


@contextlib.contextmanager
def durable_io(engine: Any, later: bool = False) -> Iterator[DurableCheckpointEngine]:
    """Lets `engine` save and load through a DurableCheckpointEngine inside the block."""
    ours = DurableCheckpointEngine(later)
    theirs, engine.checkpoint_engine = engine.checkpoint_engine, ours
    # The scripts it would put beside each checkpoint load pickles; tbf's converter reads the files safely.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield ours
    finally:
        engine.checkpoint_engine = theirs
        del engine._copy_recovery_script


@dataclass(frozen=True)
class EngineFacts:
    """What a checkpoint and the engine that loads it must agree on."""

    zero_stage: int
    optimizer: str
    layout: str
    """Hash of the flat order of the parameters. DeepSpeed itself does not notice when it differs (another grouping,
    `round_robin_gradients` switched) and would give each parameter another one's Adam moments."""
    parameters: int
    """Number of trained parameters, over all ranks."""


def engine_facts(engine: Any) -> EngineFacts:
    """Asks a DeepSpeed engine (ZeRO stage 1, 2 or 3) what its checkpoints depend on."""
    groups = [[(name, list(shape)) for name, shape in group.items()] for group in engine._get_zero_param_shapes()]
    return EngineFacts(
        zero_stage=int(engine.zero_optimization_stage()),
        optimizer=type(engine.optimizer.optimizer).__name__,
        layout=hashlib.sha256(json.dumps(groups).encode()).hexdigest(),
        parameters=sum(math.prod(shape) for group in groups for _, shape in group),
    )


def save_engine(
    engine: Any, folder: Path, client_state: dict[str, Any], weights: bool | None = None, later: bool = False
) -> DurableCheckpointEngine:
    """Collective: DeepSpeed's files into `folder`, `later` by the result's `write`. The caller looks at its `.problem`
    and `.records`.

    `weights`: whether this rank writes the weights that ZeRO-1 and -2 keep whole on every rank; None leaves that to
    DeepSpeed, whose rank 0 does.
    """
    if weights is not None and engine.zero_optimization_stage() < 3:
        engine.save_non_zero_checkpoint = weights
    with durable_io(engine, later) as io, saved_from_disk(engine):
        # Versioned for DeepSpeed's universal format, through which a run may later continue on other ranks.
        client_state = {**client_state, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False)
    return io


def load_engine(engine: Any, folder: Path) -> None:
    """Collective: weights, optimizer and scheduler from `folder`. Raises CheckpointError when DeepSpeed refuses."""
    with durable_io(engine):
        try:
            loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except (AssertionError, KeyError, OSError, RuntimeError) as error:
            raise CheckpointError(f"DeepSpeed could not load {folder}: {first_line(error)}") from error
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder}; choose another checkpoint with --resume")
    replay_bias_correction(engine.optimizer.optimizer)
    invalidate_ternary()


def replay_bias_correction(optimizer: Any) -> None:
    """Brings the host Adam's powers of beta to where an uninterrupted run has them.

    DeepSpeedCPUAdam multiplies them up in C++ from step to step and does not save them; after a load it starts from
    pow(beta, step), which differs in the last bits, so that a resumed run would drift away from a straight one. A one-
    element parameter takes the steps again. May go when the test of a killed run passes without it.
    """
    if not isinstance(optimizer, DeepSpeedCPUAdam) or not optimizer.state:
        return
    steps = max(int(state["step"]) for state in optimizer.state.values())
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    scratch = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and both moments
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *scratch)
