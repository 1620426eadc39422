"""The words before timm's options: which launcher starts how many processes."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from scalevit.errors import UserError

_SCRIPT = "distributed_train.sh"
_PER_NODE = ("--nproc_per_node", "--nproc-per-node")
_NODES = ("--nnodes",)
_MODULES = ("torch.distributed.launch", "torch.distributed.run")
_SLURM_PER_NODE, _SLURM_NODES = ("--ntasks-per-node",), ("-N", "--nodes")
_DEEPSPEED_PER_NODE, _DEEPSPEED_NODES = ("--num_gpus", "--num_accelerators"), ("--num_nodes",)
_MPI = {
    "srun": ("-n", "--ntasks"),
    "mpirun": ("-n", "-np"),
    "mpiexec": ("-n", "-np"),
    "accelerate": ("--num_processes", "--num-processes"),
}


def joined(command: str) -> str:
    """A command with its continued lines joined."""
    return re.sub(r"\\\r?\n", " ", command)


def split_command(command: str) -> tuple[list[str], int | None]:
    """The words after timm's program, and the number of processes; None where the words do not say it.

    Args:
        command: as typed in a shell, with continued lines; or the options only.

    Raises:
        UserError: it is no command of timm's program.
    """
    try:
        words = shlex.split(joined(command))
    except ValueError as error:
        raise UserError(f"timm's command: {error}") from None
    if not words:
        raise UserError("timm's command is empty")
    for place, word in enumerate(words):
        name = Path(word).name
        if name == _SCRIPT:
            return words[place + 2 :], _of_script(words[place + 1 : place + 2])
        if name == "train.py":
            return words[place + 1 :], _of_launcher(words[:place])
    if words[0].startswith("-"):
        return words, None
    raise UserError(
        f"timm's command: it has neither train.py nor {_SCRIPT}: give the command as it is typed, or a .yaml file"
    )


def _of_script(words: Sequence[str]) -> int:
    if not words or not words[0].isdigit():
        raise UserError(f"timm's command: {_SCRIPT} needs the number of processes first")
    return int(words[0])


def _of_launcher(words: Sequence[str]) -> int | None:
    """From the words of torchrun, `torch.distributed`, deepspeed, srun, MPI or accelerate; 1 for Python only."""
    names = [Path(word).name for word in words]
    if "deepspeed" in names:
        return _product(_number(words, _DEEPSPEED_PER_NODE), _number(words, _DEEPSPEED_NODES, "1"))
    for launcher, flags in _MPI.items():
        if launcher in names:
            total = _number(words, flags)
            if total is None and launcher == "srun":
                return _product(_number(words, _SLURM_PER_NODE), _number(words, _SLURM_NODES, "1"))
            return total
    if "torchrun" in names or any(module in words for module in _MODULES):
        return _product(_number(words, _PER_NODE, "1"), _number(words, _NODES, "1"))
    plain = all(re.match(r"python|-|\w+=", word) for word in names)
    return 1 if plain else None


def _product(per_node: int | None, nodes: int | None) -> int | None:
    return None if per_node is None or nodes is None else per_node * nodes


def _number(words: Sequence[str], flags: Sequence[str], default: str = "") -> int | None:
    """The last value of an option, `--flag N` or `--flag=N`; None where it is no number."""
    value = default
    for place, word in enumerate(words):
        name, equals, after = word.partition("=")
        if name in flags:
            value = after if equals else next(iter(words[place + 1 :]), "")
    return int(value) if value.isdigit() else None
