"""The seam of parameter reductions. Knows settings; must not import torch at module level."""

from scalevit.config.base import Part


class Reduction(Part):
    """How the parameters of a Vision Transformer's MLPs are reduced; `strategy` names the kind."""

    strategy: str
