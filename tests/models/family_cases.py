"""One member of each family of timm's transformers, cut to a few narrow blocks: what works with which reduction.

`python tests/models/family_cases.py` writes the table of docs/models.md; `test_families.py` compares it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.dropout import RowKeys, use_row_keys
from scalevit.models.mlps import mlp_views
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by tests/models/family_cases.py -->\n", "<!-- end of families -->"
CLASSES, IMAGES = 5, 2
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
PATCH_14 = {**SMALL, "patch_size": 14}
PATCH_16 = {**SMALL, "patch_size": 16}
STAGES = {"depths": (2, 2), "num_heads": (1, 2)}
TNT = {"depth": 2, "embed_dim": 32, "inner_dim": 8, "num_heads_outer": 2, "num_heads_inner": 2}
TWINS = {**STAGES, "embed_dims": (16, 32), "wss": (4, 4), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}


@dataclass(frozen=True, eq=False)
class Case:
    """A family, one of its models, and how it is made small."""

    family: str
    name: str
    size: int = 32
    kwargs: dict[str, Any] = field(default_factory=lambda: PATCH_16)
    drop_path: float = 0.1


CASES = (
    Case("ViT", "vit_base_patch16_224"),
    Case("ViT, attention beside MLP", "vit_base_patch16_xp_224"),
    Case("ViT, two MLPs per block", "vit_small_patch16_18x2_224"),
    Case("ViT, post-norm", "vit_base_patch16_rpn_224"),
    Case("hybrid of ResNet and ViT", "vit_tiny_r_s16_p8_224", 32, SMALL),
    Case("DeiT", "deit_tiny_patch16_224"),
    Case("DeiT, distilled", "deit_tiny_distilled_patch16_224"),
    Case("DeiT III", "deit3_small_patch16_224"),
    Case("ViT with registers", "vit_medium_patch16_reg4_gap_256"),
    Case("FlexiViT", "flexivit_small"),
    Case("CLIP", "vit_base_patch16_clip_224"),
    Case("CLIP, QuickGELU", "vit_base_patch16_clip_quickgelu_224"),
    Case("SigLIP", "vit_base_patch16_siglip_224"),
    Case("MobileCLIP hybrid", "vit_base_mci_224", 64, {"depth": 2}),
    Case("DINOv2", "vit_small_patch14_dinov2", 28, PATCH_14),
    Case("DINOv2 giant", "vit_giant_patch14_reg4_dinov2", 28, PATCH_14),
    Case("DINOv3", "vit_small_patch16_dinov3"),
    Case("DINOv3, SwiGLU", "vit_small_plus_patch16_dinov3"),
    Case("AIMv2", "aimv2_large_patch14_224", 28, PATCH_14),
    Case("SoViT-150M", "vit_so150m2_patch16_reg1_gap_256"),
    Case("SoViT-400M", "vit_so400m_patch14_siglip_gap_224", 28, PATCH_14),
    Case("BEiT", "beit_base_patch16_224"),
    Case("BEiT v2", "beitv2_base_patch16_224"),
    Case("BEiT3", "beit3_base_patch16_224"),
    Case("EVA", "eva_giant_patch14_224", 28, PATCH_14),
    Case("EVA02 tiny and small", "eva02_tiny_patch14_224", 28, PATCH_14),
    Case("EVA02 base and large", "eva02_base_patch14_224", 28, PATCH_14),
    Case("EVA02 enormous", "eva02_enormous_patch14_clip_224", 28, PATCH_14),
    Case("PE core", "vit_pe_core_base_patch16_224"),
    Case("PE spatial", "vit_pe_spatial_tiny_patch16_512"),
    Case("ViT, axial RoPE", "vit_small_patch16_rope_224"),
    Case("ViT, mixed RoPE", "vit_small_patch16_rope_mixed_224"),
    Case("ViT, RoPE and registers", "vit_base_patch16_rope_reg1_gap_256"),
    Case("NaFlexViT at a fixed size", "naflexvit_base_patch16_gap"),
    Case("ViT, relative positions", "vit_relpos_small_patch16_224"),
    Case("ViT, relative positions, post-norm", "vit_srelpos_small_patch16_224"),
    Case("Qwen3 vision encoder", "qwen3_vit_88m", 32, SMALL),
    Case("DeepSeek vision encoder", "deepseek_vit_412m", 28, SMALL),
    Case("SAM encoder", "samvit_base_patch16", 32, {**PATCH_16, "global_attn_indexes": (1,), "window_size": 2}),
    Case("CaiT", "cait_xxs24_224"),
    Case("ConViT", "convit_tiny"),
    Case("XCiT", "xcit_nano_12_p16_224"),
    Case("VOLO", "volo_d1_224", 32, {}),
    Case("Swin", "swin_tiny_patch4_window7_224", 32, {**STAGES, "embed_dim": 16, "window_size": 4}),
    Case("Swin v2", "swinv2_tiny_window8_256", 32, {**STAGES, "embed_dim": 16, "window_size": 4}),
    Case("Hiera", "hiera_tiny_224", 64, {"embed_dim": 16, "num_heads": 1, "stages": (2, 2), "q_pool": 1}),
    Case("DaViT", "davit_tiny", 64, {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2)}),
    Case("PVT v2", "pvt_v2_b0", 64, {}),
    Case("Twins", "twins_svt_small", 64, TWINS),
    Case("TNT", "tnt_s_patch16_224", 32, TNT, 0.0),
    Case("ConvNeXt", "convnext_atto", 64, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    Case("LeViT", "levit_128s", 64, {}),
)
REDUCTIONS: dict[str, Reduction] = {
    "none": NoReduction(),
    "grouped": GroupedReduction(),
    "shallow": ShallowReduction(),
    "thin": ThinReduction(mlp_ratio=1.0),
}


@dataclass
class Outcome:
    """What became of a case on the meta device."""

    mlps: list[str] = field(default_factory=list)
    """Kinds of its MLPs; empty if they cannot be reduced."""
    obstacles: dict[str, str] = field(default_factory=dict)
    """Reduction -> why it does not work; one that is missing works."""


def outcome_of(case: Case) -> Outcome:
    """Builds the case on the meta device with each reduction."""
    outcome = Outcome()
    for label, reduction in REDUCTIONS.items():
        try:
            network = build_model(config_of(case), reduction, seed=0, device="meta")
        except UserError as error:
            outcome.obstacles[label] = str(error)
            continue
        if reduction.changes_model:
            outcome.mlps = sorted({type(view.module).__name__ for views in mlp_views(network) for view in views})
    return outcome


def config_of(case: Case) -> ModelConfig:
    return ModelConfig(
        name=case.name, image_size=case.size, num_classes=CLASSES, drop_path=case.drop_path, kwargs=case.kwargs
    )


def train(case: Case, reduction: Reduction) -> tuple[float, float, nn.Module]:
    """Three steps of AdamW on two images, with the drop-path of a run.

    Returns:
        The losses without drop-path before and after, and the model.
    """
    model = build_model(config_of(case), reduction, seed=0)
    use_row_keys(model)
    keys = RowKeys(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(IMAGES, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), torch.arange(IMAGES))

    before = loss_in_evaluation(model, loss)
    for step in range(3):
        keys.set(0, step, np.arange(IMAGES), torch.device("cpu"))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, loss_in_evaluation(model, loss), model


@torch.no_grad()
def loss_in_evaluation(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    model.eval()
    value = loss().item()
    model.train()
    return value


def table(outcomes: Mapping[Case, Outcome]) -> str:
    """The table of docs/models.md."""
    lines = [
        f"| Family, for example | MLPs | {' | '.join(f'`{label}`' for label in REDUCTIONS)} | Why not |",
        "|" + "---|" * (3 + len(REDUCTIONS)),
    ]
    for case, outcome in outcomes.items():
        works = ["no" if label in outcome.obstacles else "yes" for label in REDUCTIONS]
        reasons = dict.fromkeys(_short(reason) for reason in outcome.obstacles.values())
        mlps = ", ".join(f"`{name}`" for name in outcome.mlps)
        if case.drop_path == 0.0:
            reasons["works with `model.drop_path=0`"] = None
        lines.append(f"| {case.family}: `{case.name}` | {mlps} | {' | '.join(works)} | {'; '.join(reasons)} |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """An error message without the part that the other columns say."""
    for before in (r".*cannot be reduced: ", r"model \w+: ", r"model\.name = \S+: ", r"reduction\.strategy = \S+ "):
        reason = re.sub("^" + before, "", reason)
    return re.sub(", needs timm's .*|: take a model without$|, whose statistics .*", "", reason)


def main() -> None:
    """Writes the table into the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table({case: outcome_of(case) for case in CASES}) + END + after)


if __name__ == "__main__":
    main()
