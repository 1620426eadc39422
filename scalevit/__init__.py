"""scalevit: train parameter-reduced Vision Transformers.

The public names are imported when first used, so that `import scalevit` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalevit.config.loading import load_config
    from scalevit.config.tree import Config
    from scalevit.kernels import fused_gated_mlp, fused_mlp, fused_packed_gated_mlp
    from scalevit.models.api import create_model, load_weights, reduce_model
    from scalevit.training.run import prepare
    from scalevit.training.trainer import Trainer

__version__ = "0.2.0.dev0"
__all__ = [
    "Config",
    "Trainer",
    "__version__",
    "create_model",
    "fused_gated_mlp",
    "fused_mlp",
    "fused_packed_gated_mlp",
    "load_config",
    "load_weights",
    "prepare",
    "reduce_model",
]

_MODULES = {
    "Config": "scalevit.config.tree",
    "Trainer": "scalevit.training.trainer",
    "create_model": "scalevit.models.api",
    "fused_gated_mlp": "scalevit.kernels",
    "fused_mlp": "scalevit.kernels",
    "fused_packed_gated_mlp": "scalevit.kernels",
    "load_config": "scalevit.config.loading",
    "load_weights": "scalevit.models.api",
    "prepare": "scalevit.training.run",
    "reduce_model": "scalevit.models.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'scalevit' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
