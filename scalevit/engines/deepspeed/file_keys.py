"""Names in the files that DeepSpeed writes, as `deepspeed.checkpoint.constants` has them.

Copies, so that files are recognised without importing DeepSpeed, which takes seconds.
tests/engines/test_deepspeed_internals.py compares every constant here with the installed DeepSpeed.
"""

# Of a rank's optimizer state.
ZERO_STAGE = "zero_stage"
OPTIMIZER_STATE_DICT = "optimizer_state_dict"
BASE_OPTIMIZER_STATE = "base_optimizer_state"
SINGLE_PARTITION_OF_FP32_GROUPS = "single_partition_of_fp32_groups"
FP32_FLAT_GROUPS = "fp32_flat_groups"
PARAM_SLICE_MAPPINGS = "param_slice_mappings"

# Of the module's state.
PARAM_SHAPES = "param_shapes"

# Of files.
ZERO_FILE_PREFIX = "zero_pp_rank_"
OPTIM_FILE_SUFFIX = "_optim_states.pt"
MODEL_FILE_SUFFIX = "_model_states.pt"
