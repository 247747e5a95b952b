"""The norm and the loss of a training step, read from an accelerator without making the host wait for it."""

from __future__ import annotations

import torch


class Numbers:
    """The norm of a step's gradients and its loss, on their way to the CPU."""

    def __init__(self, step: int, norm: torch.Tensor, loss: torch.Tensor) -> None:
        self.step = step
        numbers = torch.stack([norm.detach(), loss.detach().to(norm)])
        self._copied = numbers.to("cpu", non_blocking=True)
        self._event: torch.Event | None = None
        if not norm.is_cpu:
            self._event = torch.Event(norm.device)
            self._event.record()

    def read(self) -> tuple[float, float]:
        """Norm and loss; waits until the device has come to the end of that step's backward pass."""
        if self._event is not None:
            self._event.synchronize()
        norm, loss = self._copied.tolist()
        return norm, loss


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer can skip a step by a flag on the device, as the fused ones of torch do for loss scaling."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Let the next step change nothing if ``norm``, a scalar on the device, is inf or nan."""
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
