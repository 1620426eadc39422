"""What a device can do, as stated by its vendor or by the user's own file."""

import difflib
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, ValidationError

from scalevit.config.base import Section
from scalevit.errors import UserError

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Device(Section):
    """One device and its links. Rates are peaks; the shares say what of them a run is assumed to reach."""

    name: str
    memory_bytes: PositiveFloat
    flops_16bit: PositiveFloat
    """Dense bf16 or fp16 matrix products, FLOP/s."""
    flops_32bit: PositiveFloat
    """fp32 matrix products as PyTorch computes them by default (no TF32), FLOP/s."""
    memory_bandwidth: PositiveFloat
    """Bytes/s."""
    link_bandwidth: PositiveFloat
    """Bytes/s that a rank sends to its neighbour in the node, one direction."""
    network_bandwidth: PositiveFloat
    """Bytes/s that a rank sends to another node, one direction."""
    compute_share: Share = 0.5
    """Reached of the FLOP/s, by all kernels that are bound by them."""
    memory_share: Share = 0.8
    """Reached of the memory bandwidth."""
    link_share: Share = 0.8
    """Reached of the link's or the network's bandwidth."""
    usable_memory: Share = 0.9
    """Left for tensors by the driver's context, the communication library and fragmentation."""
    source: str = ""
    """Where the numbers come from."""


# Data sheets, SXM variants, one direction of NVLink (half of the printed number); the network is that of the vendor's
# DGX system, one adapter per GPU. The shares are assumptions.
_KNOWN = {
    "h200": Device(
        name="h200",
        memory_bytes=141e9,
        flops_16bit=989e12,
        flops_32bit=67e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        source="NVIDIA H200 data sheet (SXM); NVLink 900 GB/s in both directions; 400 Gbit/s per GPU (DGX H200)",
    ),
    "h100": Device(
        name="h100",
        memory_bytes=80e9,
        flops_16bit=989e12,
        flops_32bit=67e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        source="NVIDIA H100 data sheet (SXM); NVLink 900 GB/s in both directions; 400 Gbit/s per GPU (DGX H100)",
    ),
    "a100": Device(
        name="a100",
        memory_bytes=80e9,
        flops_16bit=312e12,
        flops_32bit=19.5e12,
        memory_bandwidth=2.039e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        source="NVIDIA A100 80 GB data sheet (SXM); NVLink 600 GB/s in both directions; 200 Gbit/s per GPU (DGX A100)",
    ),
    "cpu": Device(
        name="cpu",
        memory_bytes=8e9,
        flops_16bit=50e9,
        flops_32bit=50e9,
        memory_bandwidth=10e9,
        link_bandwidth=1e9,
        network_bandwidth=1e9,
        source="a round stand-in for one core, nobody's data sheet: give a file with your own numbers",
    ),
}


def load_device(name: str) -> Device:
    """A device of the table, or one from a JSON file with the fields of `Device`.

    Raises:
        UserError: no such device or file, or a file with other content.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    path = Path(name)
    if path.suffix != ".json":
        near = difflib.get_close_matches(name.lower(), _KNOWN, n=1)
        nearest = f"; nearest: {near[0]}" if near else ""
        raise UserError(f"--device {name}: is not known (allowed: {', '.join(_KNOWN)}, or a FILE.json){nearest}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--device {path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--device {path}: not valid JSON ({error})") from None
    try:
        return Device.model_validate(content, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")  # a typo explains a lack
        key = ".".join(map(str, first["loc"])) or "the file"
        if first["type"] == "extra_forbidden":
            reason = f"unknown key {key}; allowed: {', '.join(Device.model_fields)}"
        else:
            reason = f"{key}: {first['msg']}"
        raise UserError(f"--device {path}: {reason}") from None
