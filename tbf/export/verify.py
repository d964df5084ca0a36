"""Proof that an export holds what was trained: `python -m tbf.export.verify EXPORT CHECKPOINT`, in its own process.

The export is loaded strictly where DeepSpeed cannot be imported, and compared, weight by weight and by its logits on a
fixed batch, with weights that `DeepSpeedCheckpoint.reference_weights` puts together another way.
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
    from tbf.export.weights import tied_names, weight_format
    from tbf.model.bitlinear import invalidate_ternary

    model, _ = load_pretrained(export)
    exported = _logits(model)
    if not torch.isfinite(exported).all():
        raise CheckpointError(f"{checkpoint} gives NaN or infinite logits; export an earlier step")
    packed = weight_format(export) == "ternary"
    reference_model = build_without_drawing(model.config) if packed else model
    slices = packed_slices(reference_model) if packed else {}
    ties = tied_names(model)
    stored = {name: value for name, value in model.state_dict().items() if name not in ties}
    targets = reference_model.state_dict()
    opened, compared = DeepSpeedCheckpoint(checkpoint), set()
    with torch.no_grad():
        for name, reference in opened.reference_weights():
            for form, value in stored_forms(name, reference, slices):
                if form not in stored or not torch.equal(stored[form], value):
                    raise CheckpointError(_difference(checkpoint, form, stored.get(form), value))
                compared.add(form)
            targets[name].copy_(reference)
    if left := sorted(stored.keys() - compared):
        raise CheckpointError(f"{checkpoint}: nothing to verify '{left[0]}' against; pass --no-verify to export anyway")
    invalidate_ternary()
    reference_logits = _logits(reference_model)
    error = (exported - reference_logits).abs().max().item()
    tolerance = 0.0 if packed else TOLERANCE  # the same integers, so the same sums
    if not torch.allclose(exported, reference_logits, rtol=tolerance, atol=tolerance):
        raise CheckpointError(f"{checkpoint}: logits differ by {error:.2e}, more than {tolerance:.0e}; not exported")
    return {
        "logits_max_abs_error": error,
        "tolerance": tolerance,
        "tensors_equal": len(compared),
        "reference": "FP32 masters of the optimizer shards" if opened.stage < 3 else "partitions, shard by shard",
    }


def _difference(checkpoint: Path, name: str, exported: Any, reference: Any) -> str:
    if exported is None or exported.shape != reference.shape:
        return f"{checkpoint}: '{name}' of the optimizer shards does not fit the exported model; not exported"
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
    with torch.no_grad():
        hidden = model.eval()(ids, segment_ids=segments).last_hidden_state
        return model.predict(hidden[segments > 0])


if __name__ == "__main__":
    sys.exit(run_program(main))
