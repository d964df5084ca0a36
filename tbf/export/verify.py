"""Proof that an export holds what was trained: `python -m tbf.export.verify EXPORT CHECKPOINT`, in its own process.

The export is loaded strictly where DeepSpeed cannot be imported, and compared, weight by weight and by its logits on a
fixed batch, with weights that `DeepSpeedCheckpoint.reference_pieces` puts together another way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tbf
from tbf.errors import CheckpointError, run_program

TOLERANCE = 1e-5
"""Of the logits, absolute and relative; those of a ternary export must be equal."""


def verify_export(export: Path, checkpoint: Path) -> dict[str, Any]:
    """Verifies in a fresh process and returns its report. Raises CheckpointError when anything differs."""
    package_root = str(Path(tbf.__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # On the host: the card may be full, and belongs to the training.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tbf.export.verify", str(export.absolute()), str(checkpoint.absolute())]
    # Not in the user's folder, whose modules `-m` would import first.
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=package_root)
    if done.returncode != 0:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "killed, out of memory?")
        if last.startswith("error: "):
            raise CheckpointError(last.removeprefix("error: "))
        raise CheckpointError(f"the verification of {checkpoint} ended with code {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # from here on, importing it fails
    export, checkpoint = map(Path, sys.argv[1:3])
    print(json.dumps(_compare(export, checkpoint)))
    return 0


def _compare(export: Path, checkpoint: Path) -> dict[str, Any]:
    import torch

    from tbf.export.deepspeed_files import DeepSpeedCheckpoint
    from tbf.export.plain import build_without_drawing, load_pretrained
    from tbf.export.ternary import packed_slices, stored_forms
    from tbf.export.weights import weight_format

    model, _ = load_pretrained(export)
    exported = _logits(model)
    if not torch.isfinite(exported).all():
        raise CheckpointError(f"{checkpoint} gives NaN or infinite logits; export an earlier step")
    stored = _state(model)
    packed = weight_format(export) == "ternary"
    reference_model = build_without_drawing(model.config).eval() if packed else model
    opened = DeepSpeedCheckpoint(checkpoint)
    reference = _fill(reference_model, opened, None if packed else stored)
    if packed:
        slices = packed_slices(reference_model)
        for name, value in reference.items():
            for form, expected in stored_forms(name, value, slices):
                if not torch.equal(stored[form], expected):
                    raise CheckpointError(_difference(checkpoint, form, stored[form], expected))
    reference_logits = _logits(reference_model)
    error = (exported - reference_logits).abs().max().item()
    tolerance = 0.0 if packed else TOLERANCE  # the same integers, so the same sums
    if not torch.allclose(exported, reference_logits, rtol=tolerance, atol=tolerance):
        raise CheckpointError(f"{checkpoint}: logits differ by {error:.2e}, more than {tolerance:.0e}; not exported")
    return {
        "logits_max_abs_error": error,
        "tolerance": tolerance,
        "tensors_equal": len(stored),
        "reference": "FP32 masters of the optimizer shards" if opened.stage < 3 else "partitions, shard by shard",
    }


def _state(model: Any) -> dict[str, Any]:
    """The model's weights and buffers, each once."""
    from tbf.export.weights import tied_names

    ties = tied_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in ties}


def _fill(model: Any, checkpoint: Any, exported: dict[str, Any] | None) -> dict[str, Any]:
    """Writes the reference into `model`, each piece once it equals that of `exported` (if given); returns its state."""
    import torch

    state = _state(model)
    left = {name: value.numel() for name, value in state.items()}
    for name, first, piece in checkpoint.reference_pieces():
        last = first + piece.numel()
        if name not in state or last > state[name].numel():
            raise CheckpointError(f"{checkpoint.folder}: '{name}' of the optimizer shards does not fit the model")
        target = state[name].view(-1)[first:last]
        if exported is not None and not torch.equal(exported[name].view(-1)[first:last], piece):
            raise CheckpointError(_difference(checkpoint.folder, name, target, piece))
        target.copy_(piece)
        left[name] -= piece.numel()
    if missing := sorted(name for name, count in left.items() if count):
        cure = "pass --no-verify to export anyway"
        raise CheckpointError(f"{checkpoint.folder}: nothing to verify '{missing[0]}' against; {cure}")
    return state


def _difference(checkpoint: Path, name: str, exported: Any, reference: Any) -> str:
    worst = (exported.double() - reference.double()).abs().max().item()
    return (
        f"{checkpoint}: '{name}' differs by {worst:.2e} between the model file and the optimizer shards, "
        "so one of them is damaged or of another step; export another step"
    )


def _logits(model: Any) -> Any:
    """Logits at every position of a fixed batch: two packed documents, and a row with padding."""
    import torch

    config = model.config
    ids = torch.randint(0, config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    segments = torch.ones_like(ids)
    segments[0, 20:], segments[1, 40:] = 2, 0
    ids[segments == 0] = config.pad_token_id
    ids[:, 3::7] = config.mask_token_id
    # The integer form of a weight is dropped as soon as it has served: a proof is short of memory rather than of time.
    layers = [layer for layer in model.modules() if hasattr(layer, "ternary_cache")]
    hooks = [layer.register_forward_hook(_drop_integers) for layer in layers]
    with torch.no_grad():
        hidden = model.eval()(ids, segment_ids=segments).last_hidden_state
        logits = model.predict(hidden[segments > 0])
    for hook in hooks:
        hook.remove()
    return logits


def _drop_integers(layer: Any, *_: Any) -> None:
    from tbf.ops.ternary_cache import TernaryCache

    layer.ternary_cache = TernaryCache()


if __name__ == "__main__":
    sys.exit(run_program(main))
