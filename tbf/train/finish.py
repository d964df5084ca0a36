"""What happens after the last step: the export, and a summary that tells a user where everything is."""

from __future__ import annotations

from pathlib import Path

from tbf.errors import TbfError
from tbf.export.plain import export_run
from tbf.train.callbacks.csv import read_rows
from tbf.train.run_folder import CONFIG_FILE


def export_run_folder(run_dir: Path) -> Path | None:
    """Exports the newest checkpoint into `export/`, replacing that of an earlier end of the same run.

    A failed export does not fail the training: it is reported with the command that tries again.
    """
    try:
        return export_run(run_dir, run_dir / "export", force=True)
    except TbfError as error:
        print(f"the export failed ({error}); try again with: python tools/convert_ckpt.py {run_dir} {run_dir}/export")
        return None


def print_summary(run_dir: Path, ds_config: str, status: str, export: Path | None) -> None:
    """Prints where the results are and the next three commands."""
    losses = _validation_losses(run_dir / "metrics.csv")
    fall = f", validation loss {losses[0]:.3f} -> {losses[-1]:.3f}" if len(losses) > 1 else ""
    rows = [("run", run_dir), ("metrics", run_dir / "metrics.csv"), ("checkpoints", run_dir / "checkpoints")]
    if export:
        rows.append(("plain weights", export))
    print(f"\n{status}{fall}")
    for name, path in rows:
        print(f"  {name:14} {path}")
    train = f"deepspeed launch/train.py --ds_config {ds_config}"
    print("next:")
    if export:
        print(f'  tbf fill-mask {export} "La capital de España es [MASK]."')
    print(
        f"  {train} --preset {run_dir / CONFIG_FILE} --run-dir {run_dir}"
        + (" --max-steps N" if status == "done" else "")
        + "   # resume"
    )
    print(f"  {train} --preset frankenstein_2048 --data PATH_TO_TEXT   # the 2048 model", flush=True)


def _validation_losses(path: Path) -> list[float]:
    """The run's validation losses in order, without superseded rows."""
    return [float(row["val_loss"]) for row in read_rows(path) if row["val_loss"] and row["superseded"] != "1"]
