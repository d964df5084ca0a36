"""Puts a run together: configuration, process group, data, model, engine, trainer; trains; exports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

import tbf
from tbf.checkpoints.manifest import flatten
from tbf.checkpoints.ranks import gather, on_rank_0, together
from tbf.checkpoints.storage import find_storage
from tbf.config import FREE_DATA, RunConfig, load_run_config
from tbf.data.loader import BatchLoader, EvaluationRows, PackedDataset
from tbf.data.masking import MaskSpec
from tbf.data.prepare import prepare_data
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError, TbfError
from tbf.hardware.probe import peak_flops
from tbf.model.bitlinear import set_ternary_plan, ternary_shapes
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.ops.ternary_probe import choose_plan
from tbf.system import installed
from tbf.train import distributed, heartbeat_link
from tbf.train.build_ops import prepare_ops
from tbf.train.callbacks import default_callbacks
from tbf.train.checkpoint import CheckpointStore
from tbf.train.deepspeed_io import engine_facts
from tbf.train.ds_config import EngineConfig, load_ds_config
from tbf.train.ds_keys import nvme_folders
from tbf.train.environment import ProcessInfo
from tbf.train.finish import export_run_folder, print_summary
from tbf.train.gloo_threads import calm_gloo
from tbf.train.nvme import align_groups, check_nvme
from tbf.train.optim import parameter_groups
from tbf.train.preflight import Preflight
from tbf.train.rehearsal import rehearse
from tbf.train.run_folder import choose_run_dir, write_run_files
from tbf.train.schedule import moving_mask
from tbf.train.signals import StopRequest
from tbf.train.trainer import Trainer
from tbf.train.watchdog import Watchdog


def train(arguments: argparse.Namespace, process: ProcessInfo, threads: int, allocator: str, cpu_reason: str) -> int:
    """Trains as the command line of launch/train.py asks; returns the exit code."""
    say = _speaker(process)
    torch.set_num_threads(threads)
    problem, fused_adam = None, True
    try:
        run, engine_config = _settings(arguments, process)
        say(f"tbf {tbf.__version__}: preset {run.preset}, {process.world_size} rank(s), {threads} thread(s) each"
            + (f", on the CPU: {cpu_reason}" if cpu_reason else "") + f"; allocator: {allocator}")  # fmt: skip
        on_nvme = bool(nvme_folders(engine_config.config))
        fused_adam = prepare_ops(engine_config.needs_cpu_adam, say, needs_async_io=on_nvme)
    except TbfError as error:  # the other ranks must hear of it
        problem = error
        prepare_ops(False, say)  # what joining them takes
    if not fused_adam:
        engine_config.config["optimizer"]["params"]["torch_adam"] = True
        say("the optimizer runs as torch's AdamW on the host instead of DeepSpeed's fused one: slower, same result")
    facts = {} if problem else _to_compare(run, engine_config)
    device = distributed.start(process, bool(cpu_reason), facts, problem)
    try:
        return _train(arguments, process, run, engine_config, device, say)
    finally:
        distributed.stop()


def _settings(arguments: argparse.Namespace, process: ProcessInfo) -> tuple[RunConfig, EngineConfig]:
    explicit = {override.partition("=")[0].partition(".")[2] for override in arguments.overrides}
    engine_config, run = load_ds_config(arguments.ds_config, _run_config(arguments), process.world_size, explicit)
    return run, engine_config


def _to_compare(run: RunConfig, engine_config: EngineConfig) -> dict[str, dict[str, Any]]:
    """What every rank must have alike; where shards and caches lie is each machine's own affair."""
    settings = run.to_dict()
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in FREE_DATA}
    versions = {name: release for name, release in installed().items() if name != "python"}
    return {"versions": versions, "settings": flatten({**settings, "ds_config": engine_config.config})}


def _train(
    arguments: argparse.Namespace,
    process: ProcessInfo,
    run: RunConfig,
    engine_config: EngineConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> int:
    with together("cannot prepare the data"):
        run, tokenizer, shards = _prepare_data(run, arguments.run_dir, progress=process.local_rank == 0)
    rows = {"seq_len": run.data.seq_len, "seed": run.train.seed, "validation_share": run.data.validation_share}
    dataset = PackedDataset(shards, split="train", **rows)
    held_out = PackedDataset(shards, split="validation", **rows)
    require_same_data(tokenizer.fingerprint, dataset.corpus)
    mask = MaskSpec.for_tokenizer(
        tokenizer,
        run.data.mask_rate,
        run.data.mask_token_share,
        run.data.random_token_share,
        seed=run.train.seed,
        whole_words=run.data.whole_words,
    )
    preflight = Preflight(run, engine_config, process, device)
    preflight.check(say, ignore=arguments.ignore_plan)
    with preflight.explained():
        engine = build_engine(run, engine_config, device, say)
        if run.train.rehearse and not arguments.dry_run:
            seconds = rehearse(engine, run, device)
            say(f"rehearsed a step at the largest shape in {seconds:.1f} s")
    say(f"model: {engine_facts(engine).parameters:,} parameters; data: {dataset.rows_per_epoch:,} rows of "
        f"{run.data.seq_len} tokens an epoch, {held_out.rows_per_epoch:,} held out; "
        f"global batch {engine.train_batch_size()} rows")  # fmt: skip
    ranks = {"rank": process.rank, "world_size": process.world_size}
    loader = BatchLoader(
        dataset,
        mask,
        micro_batch=run.train.micro_batch_size,
        accumulation=run.train.gradient_accumulation_steps,
        num_workers=0 if arguments.dry_run else run.data.num_workers,
        pin_memory=device.type == "cuda",
        **ranks,
    )
    if arguments.dry_run:
        with preflight.explained():
            return _dry_run(engine, loader, device, say)

    run_dir, resumed = on_rank_0(lambda: choose_run_dir(arguments.run_dir, arguments.resume, run))
    storage = find_storage(run_dir)
    if not storage.shared:
        say(f"{run_dir} is not the same folder on all machines: each keeps its own ranks' part of the checkpoints; "
            f"tbf checkpoints {run_dir} gather brings them together")  # fmt: skip
    held = contextlib.ExitStack()  # keeps a second process out of the run folder, until this one ends
    on_rank_0(lambda: write_run_files(run_dir, run, engine_config, tokenizer, process, held))
    store = CheckpointStore(
        run_dir / "checkpoints",
        keep_last=run.train.keep_last,
        keep_best=run.train.keep_best,
        fingerprint=run.fingerprint(dataset.corpus),
        storage=storage,
    )
    link = None if storage.shared else heartbeat_link.connect(process.rank, os.environ["MASTER_ADDR"])
    trainer = Trainer(
        config=run,
        engine=engine,
        process=process,
        device=device,
        run_dir=run_dir,
        loader=loader,
        evaluation=EvaluationRows(
            held_out, mask, rows=run.train.eval_rows, micro_batch=run.train.micro_batch_size, **ranks
        ),
        checkpoints=store,
        callbacks=default_callbacks(
            run,
            run_dir,
            rank=process.rank,
            card_uuid=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        ),
        stop_request=StopRequest(run_dir, arguments.max_time),
        watchdog=Watchdog(run_dir, timeout=run.train.stall_timeout_s, link=link, **ranks),
        peak_flops=peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
        memory=preflight.explained,
        hosts=gather(socket.gethostname()),
    )
    if resumed is not None:
        trainer.load_state_dict(store.load(engine, resumed, **ranks))
        say(f"resumed from {resumed} at step {trainer.step}")
    loader.mask = moving_mask(mask, run, trainer.step, loader.cursor, loader.rows_per_step)
    say(f"run folder: {run_dir}")
    with trainer.stop_request, trainer.watchdog:
        status = trainer.fit()
    if process.rank == 0:
        export = export_run_folder(run_dir) if status == "done" and run.train.export_at_end else None
        print_summary(run_dir, arguments.ds_config, status, export)
    return trainer.stop_request.exit_code if status == "stopped" else 0


def require_same_data(tokenizer: str, corpus: str) -> None:
    """Raises DataError, the same on every rank, unless all have the same tokenizer and shards. Collective."""
    found = gather((socket.gethostname(), tokenizer, corpus))
    for rank, (host, *theirs) in enumerate(found):
        for name, mine, other in zip(("tokenizer", "data"), found[0][1:], theirs):
            if mine != other:
                error = DataError(
                    f"rank {rank} on {host} has another {name} ({other[:12]}) than rank 0 on {found[0][0]} "
                    f"({mine[:12]}): give all machines the same text and the same --tokenizer, or copy the prepared "
                    "folder (tbf data prepare) to each and pass it as --data"
                )
                error.on_every_rank = True
                raise error


def build_engine(run: RunConfig, engine_config: EngineConfig, device: torch.device, say: Callable[[str], None]) -> Any:
    """Builds the seeded model, equal on every rank, chooses its ternary kernels and gives it to DeepSpeed."""
    torch.manual_seed(run.train.seed)
    model = TormentedBertFrankenstein(run.model)
    checkpointing = engine_config.checkpointing
    model.set_activation_checkpointing(checkpointing.granularity, on_host=checkpointing.on_host)
    groups = parameter_groups(model, run.train.weight_decay)
    if nvme_folders(engine_config.config):
        ranks = torch.distributed.get_world_size()
        align_groups(groups, engine_config.config, ranks)
        sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
        check_nvme(engine_config.config, sizes, ranks)
    if run.model.use_bitnet:
        set_ternary_plan(model, choose_plan(device, ternary_shapes(model), say=say))
    with calm_gloo():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config=engine_config.config,
            dist_init_required=False,
        )
    return engine


def _run_config(arguments: argparse.Namespace) -> RunConfig:
    run = load_run_config(arguments.preset, arguments.overrides)
    flags = {"source": arguments.data, "tokenizer": arguments.tokenizer}
    run = run.replace(data={key: value for key, value in flags.items() if value is not None})
    return run.replace(train={"max_steps": arguments.max_steps}) if arguments.max_steps is not None else run


def _prepare_data(run: RunConfig, run_dir: str | None, progress: bool) -> tuple[RunConfig, SpanishSPMTokenizer, Path]:
    """Every rank asks; the first on each node does the work behind a lock, the others find it done."""
    given = SpanishSPMTokenizer.from_pretrained(run.data.tokenizer) if run.data.tokenizer else None
    if given and run.data.vocab_size not in (0, given.vocab_size):
        raise ConfigError(
            f"the tokenizer {run.data.tokenizer} has {given.vocab_size} tokens, but vocab_size is "
            f"{run.data.vocab_size}; leave vocab_size out, the tokenizer decides"
        )
    shards, tokenizer = prepare_data(
        run.data,
        given,
        run.data.cache_dir,
        vocab_size=run.data.wanted_vocab_size,
        progress=progress,
        count_too=[Path("runs"), *([Path(run_dir)] if run_dir else [])],
    )
    size = tokenizer.vocab_size
    model = dataclasses.replace(
        run.model, vocab_size=size, pad_token_id=tokenizer.pad_id, mask_token_id=tokenizer.mask_id
    )
    return dataclasses.replace(run, model=model), tokenizer, shards


def _dry_run(engine: Any, loader: BatchLoader, device: torch.device, say: Callable[[str], None]) -> int:
    batch = {name: tensor.to(device) for name, tensor in next(iter(loader))[0].items()}
    output = engine(**batch)
    engine.backward(output.loss)
    say(f"dry run: one forward and backward pass gave a loss of {output.loss.item():.4f}; nothing was written")
    return 0


def _speaker(process: ProcessInfo) -> Callable[[str], None]:
    """Rank 0 speaks for all."""
    return (lambda text: print(text, flush=True)) if process.rank == 0 else (lambda text: None)
