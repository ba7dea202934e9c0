"""What a network is made of and what it does, in figures."""

from typing import Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count']


@torch.inference_mode()
def count(model: nn.Module, images: torch.Tensor) -> Tuple[int, int]:
    """A network's parameters, and the multiply-adds of its convolutions and matrix products on these images.

    These are half of the operations that torch's counter counts, in the forward as it runs: the first block of a stage
    leaves out the state, which is zero there.

    Args:
        model: The network, in evaluation mode.
        images: What it takes, (B, C, height, width), on the network's device.
    """
    with FlopCounterMode(display=False) as counter:
        model(images)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
