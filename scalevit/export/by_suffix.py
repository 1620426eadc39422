"""Which exporter writes a target. Knows names of files only."""

import os
from pathlib import Path

from scalevit.errors import UserError
from scalevit.export import EXPORTERS
from scalevit.export.base import Exporter


def exporter_of(target: str) -> Exporter | None:
    """The exporter of a file's suffix, or None for a folder.

    A folder is a name without a suffix, or one that ends with a slash, or a folder that exists.

    Raises:
        UserError: no exporter has this suffix, or the file's folder does not exist.
    """
    path = Path(target)
    found = next((exporter for exporter in EXPORTERS if exporter.suffix == path.suffix), None)
    if found is None:
        if not path.suffix or target.endswith(os.sep) or path.is_dir():
            return None
        known = ", ".join(f"{exporter.suffix} ({exporter.name})" for exporter in EXPORTERS)
        raise UserError(
            f"{target}: no exporter writes {path.suffix} files; known suffixes: {known}; end the name of a new folder "
            f"with {os.sep}"
        )
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
    return found
