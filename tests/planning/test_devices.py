"""The table of devices, by the names that drivers report and by those that users give."""

import pytest

from scalevit.errors import SettingError
from scalevit.planning.devices import Device, device_names, load_device, peak_of_reported


@pytest.mark.parametrize(
    ("reported", "peak"),
    [
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GH200 144G HBM3e", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", 1307e12),
        # Names that contain one of the table, of devices that are slower or not in it.
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla V100", None),
        ("", None),
    ],
)
def test_peak_by_the_name_that_a_driver_reports(reported: str, peak: float | None) -> None:
    assert peak_of_reported(reported) == peak


def test_every_device_with_links_is_loaded_by_its_name() -> None:
    for name in device_names():
        device = load_device(name)
        assert isinstance(device, Device)
        assert device.name == name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("h20", ["unknown", "nearest: h200", "h100"]),
        ("l4", ["only its peak FLOP/s", "FILE.json"]),
        ("zzz", ["unknown"]),
    ],
)
def test_an_unusable_device_is_refused_with_what_is_allowed(name: str, parts: list[str]) -> None:
    with pytest.raises(SettingError) as refused:
        load_device(name)
    assert refused.value.argument == "device"
    for part in [*parts, *device_names()]:
        assert part in refused.value.reason
