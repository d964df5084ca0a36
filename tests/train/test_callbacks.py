"""Callbacks: what is recorded, shown, evaluated and saved, over several starts of a run."""

import csv
import importlib.util
import io
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from tbf.config import RunConfig
from tbf.errors import CheckpointError, ConfigError
from tbf.train.callbacks import default_callbacks
from tbf.train.callbacks.base import Callback, CallbackList, StepMetrics
from tbf.train.callbacks.checkpointing import Checkpointing
from tbf.train.callbacks.csv import COLUMNS, CsvMetrics, read_rows
from tbf.train.callbacks.evaluation import Evaluation
from tbf.train.callbacks.log import RankLog, TrainLog
from tbf.train.callbacks.progress import Progress
from tbf.train.callbacks.tensorboard import TensorBoard
from tbf.train.callbacks.text import count, duration, step_line
from tbf.train.callbacks.wandb import WandB
from tests.helpers.gloo import run_distributed


def metrics(step, **changes):
    values = {
        "step": step,
        "epoch": step / 100,
        "tokens": step * 1000,
        "loss": 1.0 / (step + 3),
        "masked_accuracy": 0.125,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 12345.678,
        "mfu": math.nan,
        "device_mem_gb": 0.0,
        "host_mem_gb": 1.23456,
        "data_wait": 0.01,
        "skipped": 0,
        "eta_s": 65.0,
    }
    return StepMetrics(**{**values, **changes})


class FakeStore:
    def __init__(self):
        self.saved, self.prepared = [], 0

    def prepare(self, engine, rank):
        self.prepared += 1

    def save(self, engine, step, state, rank, world_size, val_loss=None, *, healthy, background):
        assert healthy
        self.saved.append((step, val_loss))
        return Path(f"checkpoints/step-{step:08d}")

    def finish(self):
        pass

    let_go = finish


class FakeTrainer:
    """Counts steps and passes them to its callbacks the way a trainer does."""

    def __init__(self, run_dir, callbacks=(), step=0, max_steps=100, **train):
        self.run_dir, self.step, self.max_steps = run_dir, step, max_steps
        self.config = RunConfig().replace(train=train)
        self.engine, self.rank, self.world_size, self.is_main = object(), 0, 1, True
        self.checkpoints, self.guard = FakeStore(), SimpleNamespace(healthy=True)
        self.callbacks = callbacks if isinstance(callbacks, CallbackList) else CallbackList(callbacks)
        self.evaluated, self.reason = [], ""

    def evaluate(self):
        self.evaluated.append(self.step)
        return {"val_loss": 5.0 - self.step / 100, "val_masked_accuracy": 0.25}

    def state_dict(self):
        return {"step": self.step}

    def run(self, steps, status="stopped", **changes):
        self.callbacks.on_start(self)
        for _ in range(steps):
            self.step += 1
            self.callbacks.on_step(self, metrics(self.step, **changes))
        self.callbacks.on_end(self, status)


# -- the list


class Recorder(Callback):
    def __init__(self, name, calls, monitor=False, error=None):
        self.name, self.calls, self.monitor, self.error = name, calls, monitor, error

    def _note(self, hook, *details):
        self.calls.append((self.name, hook, *details))
        if self.error:
            raise self.error

    def on_start(self, trainer):
        self._note("start")

    def on_step(self, trainer, metrics):
        self._note("step")

    def on_end(self, trainer, status):
        self._note("end", status)


def test_monitors_start_first_and_the_end_is_told_backwards(tmp_path):
    calls = []
    FakeTrainer(tmp_path, [Recorder("a", calls), Recorder("m", calls, monitor=True), Recorder("b", calls)]).run(1)
    starts = [name for name, hook, *_ in calls if hook == "start"]
    steps = [name for name, hook, *_ in calls if hook == "step"]
    ends = [name for name, hook, *_ in calls if hook == "end"]
    assert (starts, steps, ends) == (["m", "a", "b"], ["a", "m", "b"], ["b", "m", "a"])


def test_a_failing_monitor_is_reported_once_and_training_goes_on(tmp_path, caplog):
    calls = []
    monitor = Recorder("m", calls, monitor=True)
    trainer = FakeTrainer(tmp_path, [monitor, Recorder("b", calls)])
    trainer.callbacks.on_start(trainer)
    monitor.error = OSError("no network")
    for step in (1, 2, 3):
        trainer.callbacks.on_step(trainer, metrics(step))
    assert calls.count(("b", "step")) == 3
    assert caplog.text.count("no network") == 1


def test_errors_of_the_others_end_training(tmp_path):
    trainer = FakeTrainer(tmp_path, [Recorder("a", [], error=CheckpointError("disk full"))])
    with pytest.raises(CheckpointError, match="disk full"):
        trainer.callbacks.on_step(trainer, metrics(1))


def test_a_save_that_fails_at_the_end_makes_the_run_failed(tmp_path):
    calls = []
    trainer = FakeTrainer(tmp_path, [Recorder("m", calls, monitor=True), Checkpointing(10)])
    trainer.checkpoints.save = lambda *args, **more: (_ for _ in ()).throw(CheckpointError("disk full"))
    with pytest.raises(CheckpointError, match="disk full"):
        trainer.run(3)
    assert calls[-1] == ("m", "end", "failed")


def test_an_error_at_the_end_does_not_hide_the_one_that_ended_the_run(tmp_path, caplog):
    trainer = FakeTrainer(tmp_path, [Recorder("a", [], error=CheckpointError("second"))])
    trainer.callbacks.on_end(trainer, "halted")
    assert "second" in caplog.text


def start_with_a_broken_monitor(rank, world_size):
    monitors = [Recorder("m", [], monitor=True, error=ConfigError("no key"))] if rank == 0 else []
    calls = []
    try:
        CallbackList([*monitors, Recorder("e", calls)]).on_start(None)
    except ConfigError as error:
        return str(error), calls
    return None


def test_a_monitor_that_cannot_start_stops_every_rank():
    assert run_distributed(start_with_a_broken_monitor, 2) == [("no key (on rank 0)", [])] * 2


# -- evaluation and checkpoints


def test_when_it_evaluates(tmp_path):
    trainer = FakeTrainer(tmp_path, [Evaluation(4)], max_steps=10)
    trainer.run(10)
    assert trainer.evaluated == [0, 4, 8, 10]
    resumed = FakeTrainer(tmp_path, [Evaluation(4)], step=6, max_steps=10)
    resumed.run(3)
    assert resumed.evaluated == [8]


def test_when_it_saves_and_with_which_loss(tmp_path):
    trainer = FakeTrainer(tmp_path, [Evaluation(4), Checkpointing(6)], max_steps=14, eval_every=4)
    trainer.run(14, "done")
    assert trainer.checkpoints.prepared == 1
    assert trainer.checkpoints.saved == [(6, None), (12, 4.88), (14, 4.86)]


@pytest.mark.parametrize(("status", "saved"), [("stopped", [(3, None)]), ("halted", []), ("failed", [])])
def test_an_interrupted_run_saves_only_when_it_was_asked_to_stop(tmp_path, status, saved):
    trainer = FakeTrainer(tmp_path, [Checkpointing(10)])
    trainer.run(3, status)
    assert trainer.checkpoints.saved == saved


def test_stopped_before_the_first_step_saves_nothing(tmp_path):
    trainer = FakeTrainer(tmp_path, [Checkpointing(10)], step=20)
    trainer.run(0)
    assert trainer.checkpoints.saved == []


# -- metrics.csv


def rows(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def steps(path, superseded="0"):
    return [int(row["step"]) for row in rows(path) if row["superseded"] == superseded]


def recorded(tmp_path, start, count, log_every=2, **changes):
    tmp_path.mkdir(exist_ok=True)
    callbacks = [CsvMetrics(tmp_path / "metrics.csv", log_every), Evaluation(6)]
    FakeTrainer(tmp_path, callbacks, step=start).run(count, **changes)
    return tmp_path / "metrics.csv"


def test_metrics_have_one_row_a_step_with_every_column(tmp_path):
    path = recorded(tmp_path, 0, 7)
    assert path.read_text().splitlines()[0].split(",") == COLUMNS
    assert steps(path) == [0, 1, 2, 4, 6]
    by_step = {int(row["step"]): row for row in rows(path)}
    assert float(by_step[4]["loss"]) == 1.0 / 7  # every bit
    assert by_step[4]["val_loss"] == "" and by_step[4]["mfu"] == "" and by_step[4]["tokens_per_s"] == "12345.7"
    assert by_step[6]["val_loss"] == "4.94" and by_step[6]["val_masked_accuracy"] == "0.25"
    assert float(by_step[6]["loss"]) == 1.0 / 9
    assert by_step[0]["val_loss"] == "5.0" and by_step[0]["loss"] == ""


def test_routers_have_columns_that_dense_models_leave_empty(tmp_path):
    (row,) = rows(recorded(tmp_path / "dense", 0, 1))[1:]
    assert row["expert_share_min"] == row["router_dropped"] == "" and row["loops"] == "1"
    router = {"expert_share_min": 0.125, "expert_share_max": 0.4, "router_entropy": 1.25, "router_dropped": 0.0}
    (row,) = rows(recorded(tmp_path / "experts", 0, 1, loops=3, **router))[1:]
    assert {name: float(row[name]) for name in router} == router and row["loops"] == "3"


def test_a_non_finite_loss_is_recorded_as_it_is(tmp_path):
    assert rows(recorded(tmp_path, 0, 1, loss=math.nan))[1]["loss"] == "nan"


def test_skipped_steps_get_a_row(tmp_path):
    callback = CsvMetrics(tmp_path / "metrics.csv", 100)
    trainer = FakeTrainer(tmp_path, [callback])
    trainer.callbacks.on_start(trainer)
    for step, skipped in [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]:
        trainer.callbacks.on_step(trainer, metrics(step, skipped=skipped))
    assert steps(callback.path) == [1, 3, 5]


def test_a_resumed_run_marks_what_it_takes_again(tmp_path):
    recorded(tmp_path, 0, 9)
    path = recorded(tmp_path, 5, 5)
    assert steps(path, "1") == [6, 8]
    assert steps(path, "0") == [0, 1, 2, 4, 6, 8, 10]
    path = recorded(tmp_path, 10, 2)
    assert steps(path, "1") == [6, 8] and steps(path, "0") == [0, 1, 2, 4, 6, 8, 10, 12]
    path = recorded(tmp_path, 0, 2)
    assert steps(path, "0") == [0, 1, 2]


def test_resuming_at_the_end_changes_no_byte(tmp_path):
    content = recorded(tmp_path, 0, 8).read_bytes()
    assert recorded(tmp_path, 8, 0).read_bytes() == content


@pytest.mark.parametrize("tail", [b"10,0.1,99", b"\0" * 300, b"10,0.1\n", b'10,"0.1\n', b"\xff\xfe\n"])
def test_what_a_crash_left_half_written_is_dropped(tmp_path, tail):
    path = recorded(tmp_path, 0, 8)
    with path.open("ab") as handle:
        handle.write(tail)
    recorded(tmp_path, 8, 2)
    assert steps(path) == [0, 1, 2, 4, 6, 8, 10]


def test_columns_of_another_version_are_kept(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,speed\n2,1.5,7\n4,1.25,8\n")
    recorded(tmp_path, 2, 2)
    assert rows(path)[0]["speed"] == "7" and rows(path)[0]["superseded"] == ""
    assert rows(path)[1]["superseded"] == "1"
    assert [row["step"] for row in read_rows(path)] == ["2", "4", "4"]


# -- people


def test_text():
    assert [duration(s) for s in (3, 65, 3_700, 100_000, math.nan, math.inf)] == [
        "3 s",
        "1 m 05 s",
        "1 h 01 m",
        "1 d 03 h",
        "?",
        "?",
    ]
    assert [count(n) for n in (7, 1234, 5.6e6, 7.8e9)] == ["7", "1.2k", "5.6M", "7.8G"]
    line = step_line(metrics(10, skipped=2), 100)
    assert line == "step 10/100  loss 0.0769  masked acc 12.5%  lr 1.00e-03  12.3k tok/s  skipped 2  ETA 1 m 05 s"


def test_lines_show_how_evenly_experts_are_used():
    line = step_line(metrics(10, expert_share_min=0.181, expert_share_max=0.312), 100)
    assert "tok/s  experts 18%-31%  ETA" in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    FakeTrainer(Path(), [Progress(1, stream), Evaluation(2)], step=1, max_steps=4).run(3)
    shown = stream.getvalue()
    assert "\r" in shown and "4/4" in shown and "loss 0.14" in shown and "ETA 1 m 05 s" in shown
    assert "step 4  validation: loss 4.9600  masked acc 25.0%" in shown


def test_progress_is_plain_lines_in_a_file():
    stream = io.StringIO()
    FakeTrainer(Path(), [Progress(2, stream), Checkpointing(2)], max_steps=4).run(4)
    assert "\r" not in stream.getvalue()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/4",
        "step 2/4",
        "step 2",
        "step 4/4",
        "step 4",
    ]
    assert "saved checkpoints/step-00000002" in stream.getvalue()


def test_the_log_is_appended_and_warnings_reach_the_terminal(tmp_path, capsys):
    path = tmp_path / "train.log"
    for start in (0, 2):
        trainer = FakeTrainer(tmp_path, [TrainLog(path, 1), Evaluation(2)], step=start)
        trainer.callbacks.on_start(trainer)
        logging.getLogger("tbf.train.trainer").warning("step %d skipped", start)
        logging.getLogger("tbf.train.trainer").info("quiet detail")
        trainer.callbacks.on_step(trainer, metrics(start + 1))
        trainer.callbacks.on_end(trainer, "done")
    text = path.read_text()
    assert text.count("start at step") == 2 and "step 3/100  loss" in text and "quiet detail" in text
    assert "WARNING step 2 skipped" in text and "validation: loss 5.0000" in text
    shown = capsys.readouterr().err
    assert "WARNING: step 0 skipped" in shown and "quiet" not in shown
    assert logging.getLogger("tbf").handlers == []


def test_tensorboard_hides_the_steps_that_a_resumed_run_takes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    FakeTrainer(tmp_path, [TensorBoard(tmp_path / "tb", 2), Evaluation(4)]).run(8)
    FakeTrainer(tmp_path, [TensorBoard(tmp_path / "tb", 2), Evaluation(4)], step=5).run(2, loss=7.0)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")][-2:] == [(4, pytest.approx(1 / 7)), (6, 7.0)]
    assert [e.step for e in events.Scalars("eval/val_loss")] == [0, 4]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_wandb_missing_is_a_config_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = RunConfig().replace(train={"wandb": True})
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r"pip install 'tbf\[wandb\]'"):
            default_callbacks(run, tmp_path, rank=rank)


def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 2):
        FakeTrainer(tmp_path, [WandB(tmp_path, "tbf-test", 1), Evaluation(2)], step=start).run(2)
    identity = (tmp_path / "wandb_run_id").read_text()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert written and b"train/loss" in b"".join(path.read_bytes() for path in written)


def test_default_callbacks(tmp_path, capsys):
    run = RunConfig().replace(train={"eval_every": 2, "save_every": 2, "log_every": 1})
    trainer = FakeTrainer(tmp_path, default_callbacks(run, tmp_path, rank=0), max_steps=4)
    trainer.run(4, "done")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "train.log", "tb", "run_status.json"}
    assert trainer.checkpoints.saved == [(2, 4.98), (4, 4.96)]
    assert '"state": "done"' in (tmp_path / "run_status.json").read_text()
    others = default_callbacks(run, tmp_path, rank=1).callbacks
    assert [type(callback) for callback in others] == [RankLog, Evaluation, Checkpointing]
    assert "step 4/4" in capsys.readouterr().err


def test_callbacks_cost_little(tmp_path):
    """All of them together stay far below a training step."""
    import time

    run = RunConfig().replace(train={"eval_every": 1000, "save_every": 1000, "log_every": 10, "tensorboard": True})
    trainer = FakeTrainer(tmp_path, default_callbacks(run, tmp_path, rank=0), max_steps=1000)
    trainer.callbacks.on_start(trainer)
    started = time.process_time()
    for step in range(1, 401):
        trainer.step = step
        trainer.callbacks.on_step(trainer, metrics(step))
    assert (time.process_time() - started) / 400 < 2e-3
    trainer.callbacks.on_end(trainer, "failed")
