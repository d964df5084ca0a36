"""What kind of value each key of a ds_config takes.

DeepSpeed meets a wrong one with a page of traceback on every rank, or takes it for another: "false" is true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tbf.errors import ConfigError

_MAY_BE_NULL = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param", "activation_checkpointing")
OBJECTS = (
    *("optimizer", "optimizer.params", "zero_optimization", *_MAY_BE_NULL),
    *("aio", "data_types", "checkpoint", "comms_logger", "flops_profiler"),
)
SWITCHES = {
    "contiguous_gradients", "reduce_scatter", "overlap_comm", "ignore_unused_parameters", "log_trace_cache_warnings",
    "enable_sanity_checks", "load_from_fp32_weights", "allgather_partitions", "use_multi_rank_bucket_allreduce",
    "round_robin_gradients", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "pin_memory", "pipeline_read", "pipeline_write", "fast_init",
    "torch_adam", "single_submit", "overlap_events", "use_gds", "cpu_checkpointing", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown", "dump_state",
}  # fmt: skip
AT_LEAST = {
    "reduce_bucket_size": 1, "allgather_bucket_size": 1, "sub_group_size": 1, "parameter_alignment": 1,
    "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_module_granularity_threshold": 0,
    "buffer_count": 1, "buffer_size": 1, "max_in_cpu": 0, "block_size": 1, "queue_depth": 1, "intra_op_parallelism": 1,
    "steps_per_print": 1,
}  # fmt: skip
"""Whole numbers, and the least that each may be. `5e7` counts as one, as for DeepSpeed."""
_FP32_ONLY = ("communication_data_type", "data_types.grad_accum_dtype")


def check_values(raw: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError at the first value of another kind than its key takes. "auto" is left to others."""
    for path in OBJECTS:
        value = _at(raw, path)
        if not isinstance(value, Mapping) and not (value is None and path in _MAY_BE_NULL):
            raise ConfigError(f"{where}: {path} is {value!r}; give an object: " + '{"key": value}')
    for path in _FP32_ONLY:
        value = _at(raw, path)
        if value not in ({}, None, "fp32"):
            raise ConfigError(f"{where}: {path} is {value!r}; tbf trains in FP32: remove it")
    _check_kinds(raw, "", where)


def _at(raw: Mapping[str, Any], path: str) -> Any:
    """What a dotted path leads to; an empty object where there is nothing."""
    value: Any = raw
    for key in path.split("."):
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    return value


def _check_kinds(block: Mapping[str, Any], prefix: str, where: str) -> None:
    for key, value in block.items():
        if isinstance(value, Mapping):
            _check_kinds(value, f"{prefix}{key}.", where)
        elif key in SWITCHES and value != "auto" and not isinstance(value, bool):
            raise ConfigError(f"{where}: {prefix}{key} is {value!r}; write true or false")
        elif key in AT_LEAST and value != "auto" and not _counts(value, AT_LEAST[key]):
            raise ConfigError(f"{where}: {prefix}{key} is {value!r}; give a whole number of at least {AT_LEAST[key]}")


def _counts(value: Any, least: int) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and float(value).is_integer() and value >= least
