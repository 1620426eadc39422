"""Optimizers of timm's factory, and where each of them may run. Must not know engines beyond their `update_scope`.

No optimizer is known by name here. What one needs and keeps is found out by running it on small tensors:
`update_scope` says how much of a parameter an update reads, `state_tensors` what it keeps between steps.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from scalevit.config.training import OptimizerConfig
from scalevit.engines.clipping import Clipping
from scalevit.engines.optimizer_access import group_scalars, kept_scalars, kept_tensors
from scalevit.engines.settings import UPDATE_SCOPES, UpdateScope
from scalevit.errors import SettingError, nearest_hint
from scalevit.models.families import classifier_names
from scalevit.training.layer_decay import move_shared_parameters

_DECAY = "optimizer.layer_decay, optimizer.frozen"
_WHERE = {
    "elements": "every engine",
    "tensors": "ZeRO stage 0 or FSDP2",
    "matrices": "ZeRO stage 0 or FSDP2 with one shard",
}


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """timm's optimizer over the unique parameters that need a gradient, in timm's groups.

    Biases, norms and other vectors, and what the model's `no_weight_decay()` names (tokens, position embeddings), do
    not decay. Adam and AdamW are fused on a GPU.

    Raises:
        SettingError: "optimizer" is no name that timm knows, "optimizer_args" do not fit it, or the model has no layers
            for "layer_decay".
    """
    if config.layer_decay is None:
        return _create(module, config.name, config.lr, config.weight_decay, config.args)
    decay = {"layer_decay": config.layer_decay, "layer_decay_min_scale": config.layer_decay_min_scale}
    optimizer = _create(module, config.name, config.lr, config.weight_decay, {**config.args, **decay})
    move_shared_parameters(optimizer, module, config)
    return optimizer


def clipping(config: OptimizerConfig, model: nn.Module) -> Clipping:
    """How an engine clips the gradients of a model; adaptive clipping leaves its classifier out, as timm's trainer."""
    exempt = classifier_names(model) if config.used_clip_mode == "agc" else ()
    return Clipping(config.clip_grad, config.used_clip_mode, frozenset(exempt))


def check_optimizer(config: OptimizerConfig, allowed: UpdateScope) -> UpdateScope:
    """Runs the optimizer on small tensors to find out what it needs, and compares that with what an engine gives.

    Args:
        allowed: the engine's `update_scope`.

    Returns:
        The optimizer's own scope.

    Raises:
        SettingError: timm does not know it, its arguments do not fit, it cannot be run with gradients only, or its
            state cannot be saved; or the engine shards what it needs whole.
    """
    for key in config.args:
        if key.startswith("layer_decay"):
            raise SettingError(
                "optimizer_args", dict(config.args), f"{key} is no argument of the optimizer: see {_DECAY}"
            )
    scope = update_scope(config.name, config.args)
    if reason := _refusal(config, scope, allowed):
        raise SettingError("optimizer", config.name, reason)
    return scope


def optimizer_refusals(config: OptimizerConfig) -> dict[UpdateScope, str]:
    """Why engines cannot run the optimizer, by their `update_scope`; those that can run it are not in it.

    Raises:
        SettingError: as `check_optimizer`, if no engine can run it.
    """
    scope = update_scope(config.name, config.args)
    reasons = {allowed: _refusal(config, scope, allowed) for allowed in UPDATE_SCOPES}
    return {allowed: reason for allowed, reason in reasons.items() if reason is not None}


def _refusal(config: OptimizerConfig, scope: UpdateScope, allowed: UpdateScope) -> str | None:
    """Why an engine cannot run the optimizer, or None if it can.

    Args:
        scope: the optimizer's.
        allowed: the engine's.
    """
    if UPDATE_SCOPES.index(scope) > UPDATE_SCOPES.index(allowed):
        needs = "norms or means of whole tensors" if scope == "tensors" else "whole matrices"
        return f"its update needs {needs}, which this engine shards; it works with {_WHERE[scope]}"
    if allowed == "elements" and _fresh(config.name, config.args).state:
        return (
            "it keeps state from its construction, which ZeRO stages 1 to 3 drop; it works with ZeRO stage 0 or FSDP2"
        )
    return None


def update_scope(name: str, args: Mapping[str, Any]) -> UpdateScope:
    """What one update of an optimizer reads, from a few steps on shaped parameters and on the same numbers reshaped.

    Raises:
        SettingError: as `check_optimizer`.
    """
    _check_state(name, args)
    values, gradients = _values(_SHAPES), _gradients(_SHAPES)
    shaped = _run(name, args, values, gradients)[1]
    # Cut inside the first tensor. Each part has an optimizer of its own: a norm over all parameters is not elementwise.
    cut = sum(tensor.numel() for tensor in values) // 3
    parts = [
        _run(name, args, [_flat(values)[part]], [[_flat(step)[part]] for step in gradients])[1][0]
        for part in (slice(0, cut), slice(cut, None))
    ]
    if _equal([torch.cat(parts)], [_flat(shaped)]):
        return "elements"
    vectors = _run(name, args, _vectors(values), [_vectors(step) for step in gradients])[1]
    return "tensors" if _equal(vectors, _vectors(shaped)) else "matrices"


def state_tensors(name: str, args: Mapping[str, Any]) -> list[str]:
    """The names of the tensors of the parameter's shape that an optimizer keeps, e.g. ["exp_avg", "exp_avg_sq"].

    Raises:
        SettingError: as `check_optimizer`.
    """
    _check_state(name, args)
    optimizer, _ = _run(name, args, _values(_SHAPES), _gradients(_SHAPES))
    names: dict[str, None] = {}
    for parameter in optimizer.param_groups[0]["params"]:
        kept = kept_tensors(optimizer.state[parameter])
        names |= {key: None for key, value in kept.items() if value.shape == parameter.shape}
    return list(names)


def _check_state(name: str, args: Mapping[str, Any]) -> None:
    """Makes sure that an optimizer's state can be saved and restored.

    Raises:
        SettingError: it cannot.
    """
    optimizer, _ = _run(name, args, _values(_SMALL), _gradients(_SMALL))
    fresh = _fresh(name, args)
    try:
        for state in optimizer.state.values():
            kept_scalars(state)
        group_scalars(optimizer.param_groups[0], fresh.param_groups[0])
    except TypeError as error:
        raise SettingError("optimizer", name, f"its state cannot be saved ({error})") from None
    if hasattr(optimizer, "train") or hasattr(optimizer, "eval"):
        raise SettingError("optimizer", name, "it has a training and an evaluation mode, which engines do not switch")
    before, after = (_numbers(one.param_groups[0]) for one in (fresh, optimizer))
    if changed := [key for key, value in before.items() if after.get(key) != value]:
        raise SettingError("optimizer", name, f"its state cannot be saved (it changes its setting {changed[0]})")


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, bool | int | float)}


# A matrix that Adafactor's variants factor (from 128 rows and columns on), a 4-D tensor and a vector.
_SHAPES = ((130, 129), (6, 3, 4, 4), (17,))
_SMALL = ((4, 3), (2, 2, 1, 1), (5,))
_STEPS = 3


def _values(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        scale * torch.randn(shape, generator=generator) for scale, shape in zip((1.0, 0.1, 3.0), shapes, strict=True)
    ]


def _gradients(shapes: Sequence[tuple[int, ...]]) -> list[list[Tensor]]:
    """By step and parameter."""
    generator = torch.Generator().manual_seed(1)
    # Orthogonal to the weights, row by row, as the gradients of scale-invariant weights are: AdamP looks for that.
    unit = torch.nn.functional.normalize(_values(shapes)[0], dim=1)
    steps = []
    for _ in range(_STEPS):
        draws = [torch.randn(shape, generator=generator) for shape in shapes]
        first, *others = (scale * draw for scale, draw in zip((0.01, 5.0, 0.3), draws, strict=True))
        steps.append([first - (first * unit).sum(dim=1, keepdim=True) * unit, *others])
    return steps


def _fresh(name: str, args: Mapping[str, Any], values: Sequence[Tensor] | None = None) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(value.clone()) for value in values or _values(_SMALL)]
    return _create([{"params": parameters, "weight_decay": 0.05}], name, 1e-2, 0.0, args)


def _run(
    name: str, args: Mapping[str, Any], values: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """Steps on the CPU; returns the optimizer and the parameters.

    Args:
        gradients: by step and parameter.
    """
    optimizer = _fresh(name, args, values)
    parameters = optimizer.param_groups[0]["params"]
    try:
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            for step in gradients:
                for parameter, gradient in zip(parameters, step, strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
    except Exception as error:  # of any kind: it is the optimizer's own code
        reason = " ".join(str(error).split())[:160]
        raise SettingError("optimizer", name, f"it cannot be run with gradients only ({reason})") from error
    return optimizer, [parameter.detach() for parameter in parameters]


def _vectors(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.flatten() for tensor in tensors]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    # Other ranges are vectorised otherwise, which changes last bits.
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(ours, expected, strict=True))


def _create(
    target: nn.Module | list[dict[str, Any]], name: str, lr: float, weight_decay: float, args: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """timm's factory, with its errors about name and arguments as errors of the setting."""
    names = [str(known) for known in timm.optim.list_optimizers()]
    if name not in names:
        raise SettingError("optimizer", name, f"is not an optimizer of timm{nearest_hint(name, names)}")
    info = timm.optim.get_optimizer_info(name)
    for key, present in (("eps", info.has_eps), ("betas", info.has_betas), ("momentum", info.has_momentum)):
        if key in args and not present:
            raise SettingError("optimizer_args", dict(args), f"{name} has no {key}")
    options = copy.deepcopy(dict(args))
    on_gpu = isinstance(target, nn.Module) and next(target.parameters()).device.type == "cuda"
    try:
        kind: Any = timm.optim.get_optimizer_class(name, bind_defaults=False)
        if on_gpu and issubclass(kind, torch.optim.Adam):  # AdamW is one too
            options.setdefault("fused", True)
        return timm.optim.create_optimizer_v2(target, name, lr=lr, weight_decay=weight_decay, **options)
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError("optimizer", name, f"it cannot be built here ({reason})") from error
    except Exception as error:  # of any kind: foreign constructors fail in any way
        reason = " ".join(str(error).split())[:200]
        raise SettingError("optimizer_args", dict(args), f"{name} refuses them ({reason})") from error
