"""The metrics of a run, accumulated from one line of its log to the next."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class MetricSums:
    """Sums of 0-d metrics over steps, kept on the device.

    The sums change in place, so a captured step can add to them.
    """

    def __init__(self, device: str) -> None:
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of one step."""
        by_type: dict[torch.dtype, list[str]] = {}
        for name, value in metrics.items():
            by_type.setdefault(value.dtype, []).append(name)
            if name not in self.sums:  # booleans are counted
                self.sums[name] = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.int64))
        for names in by_type.values():
            torch._foreach_add_([self.sums[name] for name in names], [metrics[name].detach() for name in names])
        self.steps += 1

    def read(self, scalars: Mapping[str, Tensor], reset: bool) -> dict[str, float]:
        """The mean of each metric, and `scalars`, in one read from the device. `reset` sets the sums to zero."""
        steps, *numbers = read_numbers([self.steps, *self.sums.values(), *scalars.values()])
        means = {name: total / steps for name, total in zip(self.sums, numbers, strict=False)}
        if reset:
            for total in (self.steps, *self.sums.values()):
                total.zero_()
        return means | dict(zip(scalars, numbers[len(means) :], strict=True))


@torch.no_grad()
def read_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The values of 0-d tensors, in one read from their device. Integers and booleans are returned as integers."""
    bits = [value.double().view(torch.int64) if value.is_floating_point() else value.long() for value in tensors]
    read = torch.stack(bits).cpu()
    return [
        (number.view(torch.float64) if value.is_floating_point() else number).item()
        for number, value in zip(read, tensors, strict=True)
    ]
