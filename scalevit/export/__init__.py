"""Exports: trained models in the forms of other tools, read back too; runs to and from DeepSpeed's checkpoints.

Knows runs, checkpoints, and models and engines through their seams; must not know the trainer's inside. A new exporter
is its file and one line here.
"""

from scalevit.export.base import Exporter
from scalevit.export.huggingface_folder import HuggingFaceFolder
from scalevit.export.onnx_file import OnnxFile
from scalevit.export.timm_weights import TimmWeights
from scalevit.export.torch_program import TorchProgram

EXPORTERS: tuple[Exporter, ...] = (TimmWeights(), HuggingFaceFolder(), TorchProgram(), OnnxFile())
