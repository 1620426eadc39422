"""An ONNX file: one file for onnxruntime and others, any number of images at a time."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.errors import UserError, require
from scalevit.export.base import Exported, Exporter, ModelDescription
from scalevit.export.program_record import METADATA_KEY, exported_of_record, record_of
from scalevit.terminal import format_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_EXTRA = "onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MOST_BYTES = 2_000_000_000
"""Of one protobuf message, less a margin for the graph."""


class OnnxFile(Exporter):
    """NAME.onnx; input "images" (batch, 3, S, S) float32, output "logits" (batch, classes)."""

    name = "onnx"
    suffix = ".onnx"
    purpose = "a program for onnxruntime and other runtimes"

    def check(self) -> None:
        for package in _PACKAGES:
            require(package, extra=_EXTRA)

    def write(self, model: "nn.Module", description: ModelDescription, target: Path, *, tied: bool) -> None:
        import torch

        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        if size > _MOST_BYTES:
            raise UserError(
                f"model {description.model.name}: has {format_bytes(size)} of weights, and one ONNX file holds at most "
                f"{format_bytes(_MOST_BYTES)}: use --to torch"
            )
        example = torch.zeros(2, *description.preprocessing.input_shape)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        from onnx_ir.passes.common import DeduplicateInitializersPass

        # Blocks that share an MLP have their own copies of it, transposed, until here.
        DeduplicateInitializersPass(size_limit=size)(program.model)
        for node in program.model.graph:  # traces of the source code
            node.metadata_props.clear()
        program.model.metadata_props[METADATA_KEY] = json.dumps(record_of(description))
        program.save(target, external_data=False)

    def usage(self, target: Path) -> str:
        return f"(logits,) = onnxruntime.InferenceSession({str(target)!r}).run(None, {{'images': images}})"

    def recognises(self, path: Path) -> bool:
        return path.suffix == self.suffix and path.is_file()

    def read(self, path: Path, device: "torch.device") -> Exported:
        require("onnxruntime", extra=_EXTRA)
        import onnxruntime
        import torch

        # Of those that this build of onnxruntime has; the GPU's is in another package.
        wanted = (
            ("CUDAExecutionProvider", "CPUExecutionProvider") if device.type == "cuda" else ("CPUExecutionProvider",)
        )
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(path, sess_options=options, providers=providers)
            (image_input,) = session.get_inputs()
            record = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])

            def logits(images: "Tensor") -> "Tensor":
                (found,) = session.run(None, {image_input.name: images.cpu().numpy()})
                return torch.from_numpy(found).to(images.device)

            return exported_of_record(logits, record).checked(device)
        except KeyError as error:
            raise UserError(f"export {path}: was not written by scalevit (it has no {error})") from None
        except Exception as error:  # onnxruntime does not limit the exceptions that a damaged file raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"export {path}: cannot be read ({reason})") from error
