"""How fast a run trains: images per second, and model FLOPs utilisation where the device's peak is known."""

import torch

from scalevit.planning.devices import peak_of_reported


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense matrix peak at 16-bit precision in FLOP/s; None if it is unknown, or for fp32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_of_reported(torch.cuda.get_device_name(device))


class Throughput:
    """Images and seconds of training steps, without evaluation and saving."""

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
    def images_per_second(self) -> float | None:
        """None before the first step was added: a run's first step warms up and is left out."""
        return self.images / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, 0 to 1 (PaLM, appendix B); None without a rate or a peak."""
        rate = self.images_per_second
        return None if rate is None or not self._peak else rate * self._flops_per_image / self._peak
