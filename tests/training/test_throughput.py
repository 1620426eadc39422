"""Images per second and model FLOPs utilisation."""

import pytest
import torch

from scalevit.training.throughput import Throughput, peak_flops


def test_rates_of_steps() -> None:
    throughput = Throughput(flops_per_image=2e9, peak=1e12)
    assert (throughput.images_per_second, throughput.mfu) == (None, None), "a run of one step has no rate"
    throughput.add(100, 0.5)
    throughput.add(100, 0.5)
    assert throughput.images_per_second == 200.0
    assert throughput.mfu == pytest.approx(0.4)


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 PCIe", 756e12), ("NVIDIA RTX A1000 Laptop GPU", None)])
def test_an_unknown_device_has_no_utilisation(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    assert peak_flops(cuda, "bf16") == peak
    assert peak_flops(cuda, "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
    throughput = Throughput(1e9, peak_flops(cuda, "bf16"))
    throughput.add(100, 0.5)
    assert (throughput.mfu is None) == (peak is None)
