"""How fast a run trains: images per second, and model FLOPs utilisation where the device's peak is known."""

import torch

# Dense bf16 / fp16 tensor-core peak in FLOP/s, from the vendors' data sheets. Longer names first: an "H100 NVL" is
# slower than an H100.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense matrix peak at 16-bit precision in FLOP/s; None where it is not known, or for fp32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


class Throughput:
    """Time and images of training steps, evaluation and saving left out."""

    def __init__(self, flops_per_image: float, peak: float | None) -> None:
        """
        Args:
            flops_per_image: of forward and backward.
            peak: FLOP/s of all devices together, or None.
        """
        self._flops_per_image, self._peak = flops_per_image, peak
        self.seconds = 0.0
        self.images = 0

    def add(self, images: int, seconds: float) -> None:
        """One optimizer step over all ranks."""
        self.images += images
        self.seconds += seconds

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, 0 to 1 (PaLM, appendix B)."""
        return self.images_per_second * self._flops_per_image / self._peak if self._peak else None
