"""Every private name of DeepSpeed that scalevit uses, and what it is used for. Imports deepspeed.

`PRIVATE_NAMES` lists them; tests/engines/test_deepspeed_internals.py looks each one up in the installed DeepSpeed, so
that an upgrade that drops one says which, and what breaks. The same test finds any other module that has one of these
names. The keys of DeepSpeed's files are in `file_keys`, which is read without importing DeepSpeed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

if not torch.cuda.is_available():
    # Without it DeepSpeed looks for every accelerator it knows and warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops.op_builder import AsyncIOBuilder as AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfigError as DeepSpeedConfigError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as DeepSpeedZeroConfig
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from scalevit.engines.optimizer_access import GroupCounters

CLASSES_IN_CHECKPOINTS: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's own checkpoints hold beside tensors and plain values."""

_STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_ZERO_INIT = "deepspeed.runtime.zero.partition_parameters.Init"
_LINEAR = "deepspeed.runtime.zero.linear"

PRIVATE_NAMES: dict[tuple[str, str], str] = {
    (_STAGE_3, "_leaf_module_hooks"): "remove hooks that reduce a leaf's gradients after each of its uses",
    (_STAGE_3, "_grad_acc_hooks"): "remove hooks that would be registered a second time",
    (_STAGE_3, "create_reduce_and_remove_grad_hooks"): "reduce each gradient once, when it is complete",
    (_STAGE_3, "_partition_all_parameters"): "drop gathered parameters after their shards were changed",
    (_STAGE_3, "persistent_parameters"): "gather small parameters again after their shards were changed",
    (_STAGE_3, "_swappable_optimizer_subgroup"): "find optimizer state that is on NVMe",
    (_STAGE_3, "_optimizer_states_and_gradient_swap_in"): "read optimizer state from NVMe",
    (_STAGE_3, "_optimizer_states_and_gradient_swap_out"): "write optimizer state back to NVMe",
    (_STAGE_3, "fp32_partitioned_groups_flat"): "find the flat tensors that the optimizer steps at stage 3",
    (_STAGE_3, "fp16_groups"): "find the parameters of each flat tensor at stage 3",
    (_STAGE_3, "sub_group_to_group_id"): "find the parameter group of each flat tensor at stage 3",
    (_STAGE_3, "_optimizer_step"): "know that stage 3 steps one flat tensor at a time, with the other groups empty",
    (_STAGE_1_2, "single_partition_of_fp32_groups"): "find the flat tensors that the optimizer steps at stages 1, 2",
    (_STAGE_1_2, "bit16_groups"): "find the parameters of each flat tensor at stages 1, 2",
    (_STAGE_1_2, "override_loss_scale"): "use scalevit's loss scale, which checkpoints carry",
    ("deepspeed.utils.tensor_fragment.tensor_fragment", "lp_fragment_address"): "find which elements a rank optimizes",
    ("deepspeed.utils.tensor_fragment.tensor_fragment", "hp_fragment_address"): "find them in a rank's flat tensor",
    ("deepspeed.utils.tensor_fragment.tensor_fragment", "param_group_index"): "find a rank's flat tensor",
    ("deepspeed.runtime.base_optimizer.ZeROOptimizer", "_hp_mapping"): "get from a parameter to its fragment",
    (_ZERO_INIT, "convert_to_zero_parameters"): "shard a parameter as soon as it has its initial values",
    (_ZERO_INIT, "ds_tensor"): "reach this rank's part of a parameter at stage 3",
    (_ZERO_INIT, "ds_shape"): "know the shape of a sharded parameter, and where the padding of its parts begins",
    ("deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload", "ds_z3_leaf_module"): "undo a leaf's marks",
    (_LINEAR, "LinearFunctionForZeroStage3"): "know that stage 3 replaces torch's F.linear for the whole process",
    ("deepspeed.ops", "__compatible_ops__"): "keep DeepSpeed from compiling its shared-memory reduction",
}
"""By the dotted name of a class or module and the name in it."""

_TORCH_LINEAR = nn.functional.linear


# --- the process ------------------------------------------------------------------------------------------


def reduce_log_level() -> None:
    """DeepSpeed logs every setting; its warnings and errors stay."""
    deepspeed.utils.logger.setLevel(logging.WARNING)


def keep_gloo() -> None:
    """On a CPU: else DeepSpeed compiles its own reduction over /dev/shm for a minute and leaves 67 MB there per run."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def restore_linear() -> None:
    """Undoes stage 3's replacement of F.linear for the whole process.

    DeepSpeed's does not keep gathered weights for the backward. Engines that are built later would use it too, and it
    rounds differently.
    """
    nn.functional.linear = _TORCH_LINEAR


# --- stage 3 ----------------------------------------------------------------------------------------------


def shard_parameter(parameter: nn.Parameter, first: Any, native_config: dict[str, Any]) -> None:
    """Shards a parameter of a module that is being initialised.

    Args:
        first: a parameter that was sharded before, None for the first one.
    """
    if first is None:
        deepspeed.zero.Init(
            module=nn.ParameterList([parameter]), config_dict_or_path=native_config, dtype=torch.float32
        )
    else:
        first.convert_to_zero_parameters(param_list=[parameter])


def shard_of(parameter: Any) -> Tensor:
    """This rank's part of a parameter, flat: as many elements on every rank, the last ones' padded."""
    return parameter.ds_tensor.data


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter of which this rank holds a part."""
    return parameter.ds_shape


def reduce_parameters_of_leaves_once(zero: Any, module: nn.Module) -> None:
    """Corrects stage 3's hooks for leaves, the blocks that are gathered as one and not module by module.

    Leaves take fewer and larger messages, leave the inside of a block to the compiler, and serve kernels that read
    parameters of modules they do not call. But DeepSpeed 0.19.8 reduces a leaf's gradients after each of its uses and
    fails where two leaves share a parameter. Reducing a parameter when its gradient is complete, as outside of leaves,
    is right for both.
    """
    for hook in [*zero._leaf_module_hooks, *zero._grad_acc_hooks]:
        hook.remove()
    zero._leaf_module_hooks.clear()
    zero._grad_acc_hooks.clear()
    for parameter in module.parameters():
        vars(parameter).pop("ds_z3_leaf_module", None)
    zero.create_reduce_and_remove_grad_hooks()


def gather_again(zero: Any) -> None:
    """Drops the gathered copies of parameters; those of small ones, which stay gathered, are made again."""
    zero._partition_all_parameters()
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@contextmanager
def swapped_in(zero: Any, stage: int, number: int) -> Iterator[None]:
    """Has one flat tensor's optimizer state in memory, where it is on NVMe otherwise."""
    if stage < 3 or not zero._swappable_optimizer_subgroup(number):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(number)
    yield
    zero._optimizer_states_and_gradient_swap_out(number)


def step_each_group_once(optimizer: torch.optim.Optimizer, zero: Any, counters: GroupCounters) -> None:
    """Makes a client optimizer's `step` count right at stage 3, in place.

    Stage 3 calls `step` once for each flat tensor, with every other parameter group empty. An optimizer that counts its
    steps in the groups would count each call in all of them.
    """
    step = optimizer.step
    seen: dict[int, dict[str, Any]] = {}
    first = {id(flat) for number, flat in enumerate(zero.fp32_partitioned_groups_flat) if _begins_group(zero, number)}

    def step_present(*arguments: Any, **named: Any) -> Any:
        groups = optimizer.param_groups
        present = [(number, group) for number, group in enumerate(groups) if group["params"]]
        for number, group in present:
            if id(group["params"][0]) in first:
                seen[number] = dict(counters.of(number, group))
            counters.replace(number, group, seen.get(number, {}))  # as before this step, for every flat tensor alike
        optimizer.param_groups = [group for _, group in present]
        try:
            return step(*arguments, **named)
        finally:
            optimizer.param_groups = groups

    optimizer.step = step_present  # type: ignore[method-assign]


def _begins_group(zero: Any, number: int) -> bool:
    groups = zero.sub_group_to_group_id
    return number == 0 or groups[number] != groups[number - 1]


# --- what the optimizer steps -----------------------------------------------------------------------------


def set_loss_scale(zero: Any, value: float) -> None:
    """Stages 1 to 3: what the next backward multiplies the loss by, and the step divides the gradients by."""
    zero.override_loss_scale(value)


def flat_tensors(zero: Any, stage: int) -> list[Tensor]:
    """Stages 1 to 3: this rank's flat fp32 tensors, which the optimizer keeps state for."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def parameters_of_flat(zero: Any, stage: int) -> list[list[nn.Parameter]]:
    """Stages 1 to 3: the parameters that each flat tensor is made of, those of other ranks' parts included."""
    return zero.fp16_groups if stage == 3 else zero.bit16_groups


def group_of_flat(zero: Any, stage: int, number: int) -> int:
    """Stages 1 to 3: the index of a flat tensor's parameter group in the optimizer."""
    return zero.sub_group_to_group_id[number] if stage == 3 else number


def partition_of(parameter: Any) -> tuple[slice, int, slice] | None:
    """Stages 1 and 2: which elements of a parameter this rank optimizes: (elements of the flattened parameter, number
    of the flat tensor, elements of that), or None.

    DeepSpeed's own `safe_get_full_optimizer_state` does not serve: it links the states after the first parameter
    group's first step, when the second group has none, and raises from then on (deepspeed 0.19.8).
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
    return (
        slice(ours.start, ours.start + ours.numel),
        mapping.param_group_index,
        slice(theirs.start, theirs.start + theirs.numel),
    )
