"""The training loop: rows in, one optimizer step at a time, callbacks around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from tbf.config import RunConfig
from tbf.data.loader import BatchLoader, EvaluationRows
from tbf.errors import TbfError, TrainingHalted
from tbf.model.flops import training_flops_per_token
from tbf.train.callbacks.base import CallbackList, StepMetrics
from tbf.train.checkpoint import CheckpointStore
from tbf.train.distributed import sum_over_ranks
from tbf.train.environment import ProcessInfo
from tbf.train.guard import Guard
from tbf.train.order_guard import GradientOrderGuard
from tbf.train.rollback import roll_back
from tbf.train.routing import RoutingTotals
from tbf.train.schedule import learning_rate, loop_count, weight_decay
from tbf.train.signals import StopRequest
from tbf.train.stragglers import StragglerWatch
from tbf.train.watchdog import Watchdog

Batch = dict[str, torch.Tensor]


class Trainer:
    """Trains through a DeepSpeed engine until `max_steps`, a stop request or the guard.

    A step is counted whether or not it was applied, so that the data cursor, the schedule and the step agree. What
    ends inside `memory()` for want of memory is explained by it.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        engine: Any,
        process: ProcessInfo,
        device: torch.device,
        run_dir: Path,
        loader: BatchLoader,
        evaluation: EvaluationRows,
        checkpoints: CheckpointStore,
        callbacks: CallbackList,
        stop_request: StopRequest,
        watchdog: Watchdog,
        peak_flops: float | None = None,
        hosts: Sequence[str] = (),
        memory: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.config, self.engine, self.device, self.run_dir = config, engine, device, run_dir
        self.rank, self.world_size = process.rank, process.world_size
        self.loader, self.evaluation = loader, evaluation
        self.checkpoints, self.callbacks, self.stop_request = checkpoints, callbacks, stop_request
        self.watchdog = watchdog
        self.max_steps = config.train.max_steps
        self.guard = Guard(config.train, engine.optimizer)
        self.batches: list[Batch] = []
        """This rank's micro-batches of the current step."""
        self.step = self.tokens = 0
        self.val_loss: float | None = None
        self.reason = ""
        """Why the run failed or halted."""
        self.peak_flops = peak_flops
        self._memory = memory
        self._order_guard = GradientOrderGuard(engine.module)
        self._stragglers = StragglerWatch(hosts or [""] * self.world_size, device)
        self._flops_per_token = training_flops_per_token(config.model, config.data.seq_len) if peak_flops else math.nan
        self._process = psutil.Process()
        self._step_seconds: float | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def fit(self) -> str:
        """Trains to the end; returns "done" or "stopped". Raises TrainingHalted when the guard gives up."""
        status = "failed"
        self.callbacks.on_start(self)
        try:
            with self.watchdog.explained(), self._memory():
                self._train()
            status = "done" if self.step >= self.max_steps else "stopped"
        except TbfError as error:
            self.reason = str(error)
            status = "halted" if isinstance(error, TrainingHalted) else status
            raise
        finally:
            self.callbacks.on_end(self, status)
        return status

    def _train(self) -> None:
        steps = iter(self.loader)
        while self.step < self.max_steps and not self.stop_request.agreed:
            self.callbacks.on_step(self, self.train_step(steps))
            self.watchdog.here(self.step)
            if self.guard.exhausted:
                steps.close()
                roll_back(self)
                steps = iter(self.loader)

    def train_step(self, steps: Any) -> StepMetrics:
        """One optimizer step over this rank's share of the global batch."""
        started = time.perf_counter()
        batches = self.batches = [self._to_device(batch) for batch in next(steps)]
        data_wait = time.perf_counter() - started
        own_seconds = self._stragglers.take()  # of the step before, whose kernels have ended
        self._stragglers.waited(data_wait)

        self._set_hyperparameters()
        loops = loop_count(self.step, self.config.train, self.config.model.num_loops)
        routing = RoutingTotals(self.config.model, self.device)
        self.engine.train()
        masked = sum_over_ranks(count_masked(batches))
        denominator = masked / (self.world_size * len(batches))  # undoes the engine's mean over ranks and micro-steps
        # loss, correct, tokens, stop, and every rank's own seconds
        totals = torch.zeros(4 + self.world_size, dtype=torch.float64, device=self.device)
        totals[4 + self.rank] = own_seconds
        for index, batch in enumerate(batches):
            if index > 0:
                self.engine.step()  # ends the micro-step before; the guard comes before the last one's
            with self._stragglers.alone():
                output = self.engine(**batch, loss_denominator=denominator, num_loops=loops)
            self.engine.backward(nan_if_not_finite(output.loss))
            self._order_guard.check()
            self.watchdog.here(self.step)
            totals[0] += output.mlm_loss / (self.world_size * len(batches))
            totals[1] += output.masked_correct
            totals[2] += (batch["segment_ids"] > 0).sum()
            routing.add(output.router)
        totals[3] += self.stop_request.requested
        loss, correct, tokens, stop, *everyones_seconds = sum_over_ranks(totals).tolist()
        routing.reduce()
        self.guard.before_update(loss)
        self.engine.step()

        applied = self.engine.was_step_applied()
        self.step += 1
        self.tokens += int(tokens)
        self.stop_request.agree(stop)
        grad_norm = self.guard.after_update(self.step, loss, applied)
        if self.is_main:
            self._stragglers.judge(everyones_seconds)
        if applied:
            routing.update_biases(self.engine.module)
        metrics = self._metrics(
            loss, correct / masked.item(), grad_norm, tokens, time.perf_counter() - started, data_wait
        )
        return replace(metrics, loops=loops, **routing.metrics())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Masked loss (nats) and accuracy over the held-out rows, equal whatever the number of ranks."""
        self.engine.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss sum, correct, masked
        for batch in self.evaluation:
            batch = self._to_device(batch)
            output = self.engine(**batch, loss_denominator=1.0)
            totals[0] += output.mlm_loss
            totals[1] += output.masked_correct
            totals[2] += count_masked([batch])
            self.watchdog.here(self.step)
        self.engine.train()
        loss, correct, masked = sum_over_ranks(totals).tolist()
        self.val_loss = loss / masked
        return {"val_loss": self.val_loss, "val_masked_accuracy": correct / masked}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the engine's own state: plain numbers only."""
        return {
            "step": self.step,
            "cursor": self.loader.cursor,
            "tokens": self.tokens,
            "val_loss": self.val_loss,
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.val_loss = state["step"], state["tokens"], state["val_loss"]
        self.guard.load_state_dict(state["guard"])
        self.loader.cursor = state["cursor"]

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _set_hyperparameters(self) -> None:
        train = self.config.train
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.guard.lr_factor * learning_rate(self.step, train)
            if group["weight_decay"] > 0 or group.get("name") == "decayed":
                group["weight_decay"] = weight_decay(self.step, train)

    def _metrics(
        self, loss: float, accuracy: float, grad_norm: float, tokens: float, seconds: float, data_wait: float
    ) -> StepMetrics:
        rate = tokens / seconds
        peak = (self.peak_flops or math.nan) * self.world_size
        return StepMetrics(
            step=self.step,
            epoch=self.loader.epoch,
            tokens=self.tokens,
            loss=loss,
            masked_accuracy=accuracy,
            lr=self.guard.lr_factor * learning_rate(self.step - 1, self.config.train),
            grad_norm=grad_norm,
            tokens_per_s=rate,
            mfu=rate * self._flops_per_token / peak,
            device_mem_gb=torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0,
            host_mem_gb=self._process.memory_info().rss / 1e9,
            data_wait=data_wait / seconds,
            skipped=self.guard.skipped,
            eta_s=(self.max_steps - self.step) * self._smoothed(seconds),
        )

    def _smoothed(self, seconds: float) -> float:
        """Seconds a step takes lately, for the time left."""
        self._step_seconds = seconds if self._step_seconds is None else 0.9 * self._step_seconds + 0.1 * seconds
        return self._step_seconds


def count_masked(batches: list[Batch]) -> torch.Tensor:
    """Number of positions that carry loss, as a tensor on the batches' device."""
    return torch.stack([(batch["masked_labels"] != -100).sum() for batch in batches]).sum().float()


def nan_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """Turns an infinite loss into NaN gradients, without a sync, so that the engine's norm check skips the step."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
