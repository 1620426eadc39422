"""The page docs/from-timm.md, from the table of options."""

import json
from collections import Counter

from scalevit.config.from_timm.option import FATES, TimmOption
from scalevit.config.from_timm.table import GROUPS, OPTIONS, TIMM_VERSION

_INTRODUCTION = """\
# From a timm command

`scalevit from-timm` turns a command of timm's `train.py`, or the `args.yaml` of its output folder, into a config
(`make schema` writes this page, from the same table that the command reads):

```
scalevit from-timm "torchrun --nproc_per_node=4 train.py /data/birds --model vit_small_patch16_224 --opt adamw" \\
    --output birds.json
scalevit from-timm output/train/vit_small/args.yaml --gpus 4 --output birds.json
scalevit train --config birds.json
```

The config goes to the standard output or into `--output`; lines on the standard error name each option that it does not
keep, and why. An option that is not given has timm's default, so timm's SGD and its rate are written where the command
names no others. The global batch is that of all processes, which the words before `train.py` give, or `--gpus`. Image
size, number of classes and stochastic depth are those of timm's model where the command gives none. Names and arguments
that timm refuses (optimizer, policy, model) are refused here too. Where the default engine cannot run the optimizer or
the clipping (LAMB, Adafactor, `--clip-mode agc`), one that can is written, with a line that says so.

The config has the recipe: what decides what is learnt. Two things are left out, and named with the setting that adds
each, unless `--exact` is given: what belongs to the machine and the run's folder (name, folder, workers, logging,
checkpoints), and behaviour of timm's program that no option names and for which scalevit has another default (fp16,
erasing after mixing, the order of repeats, the start of the EMA, [and so on](differences.md)). The four commands of the
paper's README so give the presets baseline, grouped, shallow and thin.

Folders of images and data sets of other kinds are written as shards first; the commands are printed."""


def markdown() -> str:
    """The page: what becomes of every option."""
    parts = [_INTRODUCTION, "", "## What becomes of the options", "", _counts(), ""]
    parts += [f"- {_fate_name(fate)}: {meaning}." for fate, meaning in FATES.items()]
    for title, options in GROUPS.items():
        parts += ["", f"## {title}", "", "| Option | Default in timm | Here | How, or why not |", "|---|---|---|---|"]
        parts += [_row(option) for option in options]
    return "\n".join(parts)


def _counts() -> str:
    timm = [option for option in OPTIONS.values() if not option.paper]
    counts = Counter(option.fate for option in timm)
    same = sum(option.has_same_name for option in timm)
    renamed = counts["key"] + counts["machine"] - same
    listed = ", ".join(f"{counts[fate]} {fate}" for fate in FATES if fate not in ("key", "machine"))
    return (
        f"Of the {len(timm)} options of timm's train.py, version {TIMM_VERSION}, {same} have a key of the same name,\n"
        f"{renamed} a key of another name; {listed}.\n"
        f"The paper's copy has {len(OPTIONS) - len(timm)} more."
    )


def _fate_name(fate: str) -> str:
    return {"key": "same name, renamed", "machine": "with `--exact`"}.get(fate, fate)


def _row(option: TimmOption) -> str:
    flags = ", ".join(f"`{flag}`" for flag in option.flags)
    keys = ", ".join(f"`{key}`" for key in option.keys)
    fate = {"key": "", "machine": "with `--exact`"}.get(option.fate, option.fate)
    if option.fate in ("key", "machine"):
        fate = " ".join(filter(None, ("same name" if option.has_same_name else "renamed", fate)))
    here = ": ".join(filter(None, (fate, keys)))
    default = f"`{json.dumps(option.form.default)}`" if option.form.default is not None else "-"
    note = option.note
    if option.needs:
        used = f"used by timm with `{OPTIONS[option.needs].flag}` only"
        note = f"{note}; {used}" if note else used
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (flags, default, here, note)) + " |"
