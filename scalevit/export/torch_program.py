"""A program that torch runs without timm and without scalevit: `torch.export`, any number of images at a time."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.errors import UserError
from scalevit.export.base import Exported, Exporter, ModelDescription
from scalevit.export.program_record import EXTRA_FILE, exported_of_record, record_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class TorchProgram(Exporter):
    """NAME.pt2."""

    name = "torch"
    suffix = ".pt2"
    purpose = "a program for torch.export.load"

    def write(self, model: "nn.Module", description: ModelDescription, target: Path, *, tied: bool) -> None:
        import torch

        program = exported_program(model, description.preprocessing.input_shape)
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:  # traces of the source code, which a reader would have to trust
                    node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        torch.export.save(program, target, extra_files={EXTRA_FILE: json.dumps(record_of(description))})

    def usage(self, target: Path) -> str:
        return f"logits = torch.export.load({str(target)!r}).module()(images)"

    def recognises(self, path: Path) -> bool:
        return path.suffix == self.suffix and path.is_file()

    def read(self, path: Path, device: "torch.device") -> Exported:
        from torch.export.passes import move_to_device_pass

        from scalevit.export.program_check import check_program, load_checked

        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"export {path}: cannot be read ({error.strerror})") from None
        check_program(path, content)
        try:
            program, extra = load_checked(content)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            return exported_of_record(program.module(), json.loads(extra[EXTRA_FILE])).checked(device)
        except Exception as error:  # torch does not limit the exceptions that a damaged file raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"export {path}: cannot be read ({reason})") from error


def exported_program(model: "nn.Module", input_shape: tuple[int, int, int]) -> "torch.export.ExportedProgram":
    """The model's operations, for any number of images of one shape.

    Raises:
        UserError: torch cannot express the model so.
    """
    import torch

    example = torch.zeros(2, *input_shape)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # of any kind: it runs the model's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"model {type(model).__name__}: torch.export cannot write it as a program ({reason})"
        ) from error
