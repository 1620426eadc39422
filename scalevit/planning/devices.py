"""The one table of devices: peak FLOP/s for utilisation, and what a plan needs besides, as stated by the vendors.

Knows numbers and names; must not know models, engines or torch.
"""

import json
import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, PositiveFloat, ValidationError

from scalevit.config.base import Section
from scalevit.errors import SettingError, nearest_hint

Efficiency = Annotated[float, Field(gt=0.0, le=1.0)]


class DevicePeak(Section):
    """The peak rate of a device."""

    name: str
    flops_16bit: PositiveFloat
    """Dense bf16 or fp16 matrix products with fp32 accumulation, FLOP/s."""
    source: str = ""
    """Where the numbers come from."""


class Device(DevicePeak):
    """A device and its links. Rates are peaks; the shares are the assumed fractions of them that a run reaches."""

    memory_bytes: PositiveFloat
    flops_32bit: PositiveFloat
    """fp32 matrix products as PyTorch computes them by default (no TF32), FLOP/s."""
    memory_bandwidth: PositiveFloat
    """Bytes/s."""
    link_bandwidth: PositiveFloat
    """Bytes/s that a rank sends to its neighbour in the node, one direction."""
    network_bandwidth: PositiveFloat
    """Bytes/s that a rank sends to another node, one direction."""
    compute_share: Efficiency = 0.5
    """Of the FLOP/s, for all operators that are bound by them."""
    memory_share: Efficiency = 0.8
    """Of the memory bandwidth."""
    link_share: Efficiency = 0.8
    """Of the link's or the network's bandwidth."""
    usable_memory: Efficiency = 0.9
    """Of the memory; the rest is for the driver's context, the communication library and fragmentation."""


class _Entry(NamedTuple):
    device: DevicePeak
    reported: str | None
    """Regular expression of the whole names that drivers report. Laptop variants, cut-down variants and parts of a
    device (MIG) have other peaks and must not match."""


def _peak(name: str, flops_16bit: float, source: str, reported: str) -> _Entry:
    return _Entry(DevicePeak(name=name, flops_16bit=flops_16bit, source=source), reported)


# Data sheets. Where links are given: SXM variants, one direction of NVLink (half of the printed number); the network is
# that of the vendor's DGX system, one adapter per GPU. Data sheets print 16-bit rates with sparsity: half of that here.
_TABLE = (
    _Entry(
        Device(
            name="h200",
            memory_bytes=141e9,
            flops_16bit=989e12,
            flops_32bit=67e12,
            memory_bandwidth=4.8e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            source="NVIDIA H200 data sheet (SXM); NVLink 900 GB/s in both directions; 400 Gbit/s per GPU (DGX H200)",
        ),
        r"NVIDIA H200",
    ),
    _Entry(
        Device(
            name="h100",
            memory_bytes=80e9,
            flops_16bit=989e12,
            flops_32bit=67e12,
            memory_bandwidth=3.35e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            source="NVIDIA H100 data sheet (SXM); NVLink 900 GB/s in both directions; 400 Gbit/s per GPU (DGX H100)",
        ),
        r"NVIDIA H100 \d+GB HBM3",
    ),
    _Entry(
        Device(
            name="a100",
            memory_bytes=80e9,
            flops_16bit=312e12,
            flops_32bit=19.5e12,
            memory_bandwidth=2.039e12,
            link_bandwidth=300e9,
            network_bandwidth=25e9,
            source="NVIDIA A100 80 GB data sheet (SXM); NVLink 600 GB/s in both directions; "
            "200 Gbit/s per GPU (DGX A100)",
        ),
        r"(NVIDIA )?A100(-SXM4?-(40|80)GB|-PCIE-(40|80)GB| 80GB PCIe)",
    ),
    _Entry(
        Device(
            name="cpu",
            memory_bytes=8e9,
            flops_16bit=50e9,
            flops_32bit=50e9,
            memory_bandwidth=10e9,
            link_bandwidth=1e9,
            network_bandwidth=1e9,
            source="a round stand-in for one core, nobody's data sheet: give a file with your own numbers",
        ),
        None,
    ),
    _peak("b200", 2250e12, "NVIDIA HGX B200 data sheet", r"NVIDIA B200"),
    _peak("gh200", 989e12, "NVIDIA GH200 data sheet", r"NVIDIA GH200 \d+GB?( HBM3e)?"),
    _peak("h200-nvl", 835e12, "NVIDIA H200 NVL data sheet", r"NVIDIA H200 NVL"),
    _peak("h100-nvl", 835e12, "NVIDIA H100 NVL data sheet", r"NVIDIA H100 NVL"),
    _peak("h100-pcie", 756e12, "NVIDIA H100 PCIe data sheet", r"NVIDIA H100 PCIe"),
    _peak("l40s", 362e12, "NVIDIA L40S data sheet", r"NVIDIA L40S"),
    _peak("l40", 181e12, "NVIDIA L40 data sheet", r"NVIDIA L40"),
    _peak("l4", 121e12, "NVIDIA L4 data sheet", r"NVIDIA L4"),
    _peak("rtx4090", 165e12, "NVIDIA Ada GPU architecture white paper", r"NVIDIA GeForce RTX 4090"),
    _peak("mi300x", 1307e12, "AMD Instinct MI300X data sheet", r"AMD Instinct MI300X( OAM)?"),
    # The data sheet's 383e12 is of both dies; each of them is a device to PyTorch.
    _peak("mi250x", 191.5e12, "AMD Instinct MI250X data sheet, one of two dies", r"AMD Instinct MI250X"),
)


def peak_of_reported(name: str) -> float | None:
    """Dense 16-bit peak in FLOP/s of a device by the name that its driver reports; None if it is not in the table."""
    for device, reported in _TABLE:
        if reported is not None and re.fullmatch(reported, name):
            return device.flops_16bit
    return None


def device_names() -> list[str]:
    """Names that `load_device` knows."""
    return [device.name for device, _ in _TABLE if isinstance(device, Device)]


def load_device(name: str) -> Device:
    """A device of the table, or one from a JSON file with the fields of `Device`.

    Raises:
        SettingError: no such device or file, a device without links in the table, or a file with other content.
    """
    if name.endswith(".json"):
        return _read_device(Path(name))
    allowed = f"allowed: {', '.join(device_names())}, or a FILE.json"
    for device, _ in _TABLE:
        if device.name == name:
            if isinstance(device, Device):
                return device
            raise SettingError(
                "device", name, f"the table has only its peak FLOP/s, not its memory and links; {allowed}"
            )
    raise SettingError("device", name, f"unknown{nearest_hint(name, device_names())} ({allowed})")


def _read_device(path: Path) -> Device:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError("device", str(path), f"cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingError("device", str(path), f"not valid JSON ({error})") from None
    try:
        return Device.model_validate(content, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # First an unknown key: if it is a typo, it explains why another key is missing.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        key = ".".join(map(str, first["loc"])) or "the file"
        if first["type"] == "extra_forbidden":
            reason = f"unknown key {key}; allowed: {', '.join(Device.model_fields)}"
        else:
            reason = f"{key}: {first['msg']}"
        raise SettingError("device", str(path), reason) from None
