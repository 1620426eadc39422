"""The model and how its MLPs are computed. Settings only: must not import torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scalevit.config.base import FilePath, Section

WeightsSet = Literal["auto", "weights", "ema"]
"""Which of a file's sets of weights is read; auto: the EMA where there is one."""


WEIGHTS_SETTINGS = {"initial_weights", "initial_weights_set", "pretrained"}
"""Settings of a model that say which weights it starts from; it is the same model with others."""


class ModelConfig(Section):
    """The timm model that is trained."""

    name: str = "vit_base_patch16_224"
    """A model of timm's registry. Reductions need blocks with timm's Mlp, GluMlp or SwiGLU: ViT, DeiT, DINOv2, DINOv3,
    SigLIP, EVA02, BEiT, Swin and others (docs/models.md lists them). Without a reduction any without batch norms."""
    image_size: PositiveInt = 224
    """Side of the square input in pixels."""
    in_chans: PositiveInt = 3
    """Input channels: 3 reads images in RGB, 1 in grey (Pillow's "L"). The filters of RGB weights are adapted as timm
    does. Other numbers are for `scalevit.create_model`: a run reads no such images."""
    num_classes: PositiveInt = 1000
    """Number of classes; every label must be below it."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth rate of the last block."""
    drop_path_mode: Literal["linear", "constant"] = "linear"
    """Rate of the blocks before it: it grows linearly from 0 at the first (timm), or is the same in all (DeiT III)."""
    initial_weights: FilePath | None = None
    """Weights to start from: a file (`.safetensors`, `.pth`, timm's `.pth.tar`, JAX's `.npz`), a folder of the Hugging
    Face form (config.json and model.safetensors; also `local-dir:PATH`), `hf-hub:ORG/NAME[@REVISION]` or
    `timm:NAME.TAG`. Reduced weights are recognised, so they are never reduced twice."""
    initial_weights_set: WeightsSet = "auto"
    """Which weights of a file with several sets, such as timm's checkpoints: auto takes the EMA where there is one."""
    pretrained: bool = False
    """Starts from timm's pretrained weights of `name` (with its tag, if it has one): from the Hugging Face hub's cache,
    else downloaded. The same as `initial_weights=timm:NAME`."""
    head_init_scale: PositiveFloat | None = None
    """Factor on the initial values of a classifier that is newly initialised (timm's `--head-init-scale`); null: 1."""
    head_init_bias: float | None = None
    """Initial bias of such a classifier, for example -6.9 for 1,000 classes and `loss.name=bce`; null: timm's."""
    kwargs: dict[str, Any] = {}
    """More arguments of the timm factory, for example {"embed_dim": 96, "depth": 6}."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> "ModelConfig":
        if self.pretrained and self.initial_weights is not None:
            raise ValueError(
                f"pretrained = true, and initial_weights = {self.initial_weights}: give one of the two (pretrained is "
                f"the same as initial_weights=timm:{self.name})"
            )
        return self

    @property
    def weights_source(self) -> str | None:
        """Where the initial weights are: a file, a folder or an address; None initialises from the seed."""
        return self.initial_weights or (f"timm:{self.name}" if self.pretrained else None)

    def without_weights(self) -> "ModelConfig":
        """The same model without initial weights, for its shapes or for tensors that replace them."""
        return self.model_copy(update={"pretrained": False, "initial_weights": None, "initial_weights_set": "auto"})


class KernelsConfig(Section):
    """How MLPs are computed."""

    mlp: Literal["auto", "triton", "eager"] = "auto"
    """auto: fused Triton kernels where they can run, else PyTorch; triton: an error otherwise; eager: PyTorch."""
    save: Literal["fast", "lean", "recompute"] = "fast"
    """What the fused forward keeps for the backward: 4, 2 or 0 bytes per hidden unit and token in bf16."""
