"""The keys of a ds_config that tbf accepts, and why it refuses the others.

DeepSpeed ignores unknown top-level keys and keys that mean nothing at the chosen ZeRO stage. A month of training under
a setting that was never in force is worse than a message at the start, so both are errors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tbf.errors import ConfigError, nearest
from tbf.train.ds_values import check_values

TOP = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "zero_optimization", "activation_checkpointing", "aio", "communication_data_type", "comms_logger",
    "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "data_types", "checkpoint",
}  # fmt: skip
TOP_REFUSED = {
    "scheduler": "the preset's train section owns the learning-rate schedule",
    "elasticity": "DeepSpeed 0.19 has removed it",
    "prescale_gradients": "ZeRO reduces by scattering, which takes no scaling beforehand",
    "gradient_predivide_factor": "ZeRO reduces by scattering, which takes no scaling beforehand",
    "data_efficiency": "the loader owns the order of the data, which resuming depends on",
    "curriculum_learning": "the loader owns the order of the data, which resuming depends on",
    "compression_training": "the layers quantise themselves",
    "compile": "torch.compile needs Triton, which Pascal cards have not",
    "tensorboard": "the preset's train.tensorboard switches it",
    "wandb": "the preset's train.wandb switches it",
    "csv_monitor": "every run writes metrics.csv",
}
ZERO = {
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm", "offload_optimizer",
    "ignore_unused_parameters", "log_trace_cache_warnings", "enable_sanity_checks", "load_from_fp32_weights",
}  # fmt: skip
ZERO_BELOW_3 = {
    "allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce", "parameter_alignment",
    "round_robin_gradients",
}  # fmt: skip
ZERO_3 = {
    "offload_param", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip
_QUANTISED = "its kernels work on 16-bit values, and training is in FP32"
ZERO_REFUSED = {
    "cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": 'write "pin_memory" inside offload_optimizer',
    "compute_grad_norm": "non-finite steps are found by the gradient norm",
    "zero_quantized_weights": _QUANTISED,
    "zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_quantized_gradients": _QUANTISED,
    "zero_hpz_partition_size": "checkpoints of secondary partitions can't be verified or converted yet",
    "zenflow": "it updates weights between steps, where layers keep their ternary form",
    "elastic_checkpoint": "DeepSpeed has given it up; another number of ranks resumes by itself",
    "legacy_stage1": "it shares no code with the stage 1 that is tested here",
    "memory_efficient_linear": "it replaces torch's linear function for the whole process",
    "override_module_apply": "it changes torch.nn.Module for the whole process",
    "pipeline_loading_checkpoint": "there is no pipeline parallelism",
    "leaf_module": "experts are stacked in one parameter, so no module needs to be a leaf",
    "save_muon_momentum_buffer_in_memory": "tbf trains with AdamW",
}
OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay", "torch_adam"}
AIO = {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
OFFLOAD = {
    "offload_optimizer": {
        "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
    },
    "offload_param": {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"},
}  # fmt: skip
_PARAMS_REFUSED = {"max_grad_norm": "it is not DeepSpeed's; use gradient_clipping"}
OFFLOAD_REFUSED = {
    "super_offload": "it is made for cards that share memory with the host",
    "cpuadam_cores_perc": "it belongs to super_offload",
}
PIPELINE_BUFFERS = 12
"""Of a sub-group's size: weights, gradients and two moments of those that are read, updated and written."""
CHECKPOINTING_REFUSED = {
    "partition_activations": "it needs model parallelism, which tbf has not",
    "contiguous_memory_optimization": "it needs model parallelism, which tbf has not",
    "number_checkpoints": "it sizes DeepSpeed's contiguous buffers; write granularity",
    "synchronize_checkpoint_boundary": "it belongs to DeepSpeed's reentrant checkpointing, which looped layers break",
    "profile": "it belongs to DeepSpeed's reentrant checkpointing, which looped layers break",
}


def check_keys(raw: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError at the first key of a ds_config that would do nothing, or harm; names the cure."""
    check_values(raw, where)
    _check(raw, "", TOP, TOP_REFUSED, where)
    _check(raw.get("aio", {}), "aio.", AIO, {}, where)
    optimizer = raw.get("optimizer", {})
    _check(optimizer, "optimizer.", {"type", "params"}, {}, where)
    _check(optimizer.get("params", {}), "optimizer.params.", OPTIMIZER_PARAMS, _PARAMS_REFUSED, where)
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for key in sorted(set(zero) & (ZERO_3 if stage != 3 else ZERO_BELOW_3)):
        raise ConfigError(f"{where}: zero_optimization.{key} does nothing at stage {stage}; remove it")
    _check(zero, "zero_optimization.", ZERO | ZERO_BELOW_3 | ZERO_3, ZERO_REFUSED, where)
    for name, known in OFFLOAD.items():
        block = zero.get(name) or {}
        _check(block, f"zero_optimization.{name}.", known, OFFLOAD_REFUSED, where)
        _check_offload(block, f"zero_optimization.{name}", stage, where)


def check_checkpointing_keys(block: Mapping[str, Any], where: str) -> None:
    """The same for the `activation_checkpointing` block; refused keys may be there as long as they are off."""
    on = {key: value for key, value in block.items() if value or key not in CHECKPOINTING_REFUSED}
    known = {"granularity", "cpu_checkpointing"}
    _check(on, "activation_checkpointing.", known, CHECKPOINTING_REFUSED, where)


def nvme_folders(config: Mapping[str, Any]) -> list[Path]:
    """Where the config keeps state on NVMe, none, one or two folders."""
    zero = config.get("zero_optimization", {})
    blocks = (zero.get(name) or {} for name in ("offload_optimizer", "offload_param"))
    return sorted({Path(block["nvme_path"]) for block in blocks if block.get("device") == "nvme"})


def _check_offload(block: Mapping[str, Any], name: str, stage: int, where: str) -> None:
    device = block.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(f"{where}: {name}.device is {device!r}; choose none, cpu or nvme")
    if device == "nvme" and stage != 3:
        raise ConfigError(f"{where}: {name}.device nvme needs ZeRO stage 3, not {stage}; see p40_zero3_nvme.json")
    if device == "nvme" and not block.get("nvme_path"):
        raise ConfigError(f"{where}: {name}.device is nvme without nvme_path; name a folder on the NVMe disk")
    piped = name.endswith("offload_optimizer") and (block.get("pipeline_read") or block.get("pipeline_write"))
    if device == "nvme" and piped and block.get("buffer_count", 4) < PIPELINE_BUFFERS:
        raise ConfigError(
            f"{where}: {name}.buffer_count is {block.get('buffer_count', 4)}, with which pipelining dies in the first "
            f"step of a model of several sub-groups; set it to {PIPELINE_BUFFERS}, or both pipeline_* to false"
        )


def _check(block: Mapping[str, Any], prefix: str, known: Iterable[str], refused: Mapping[str, str], where: str) -> None:
    for key in block:
        if key in refused:
            raise ConfigError(f"{where}: '{prefix}{key}' is not supported: {refused[key]}; remove it")
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'; {nearest(str(key), sorted(known))}")
