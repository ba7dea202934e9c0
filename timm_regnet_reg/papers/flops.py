"""What a network is made of and what it does, in figures."""

from typing import Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count']


def count(model: nn.Module, *inputs: torch.Tensor) -> Tuple[int, int]:
    """What a network is made of and what it does.

    Args:
        model: The network, in evaluation mode.
        *inputs: What it takes: images (B, C, height, width), on the network's device.

    Returns:
        Its parameters, and the multiply-adds of its convolutions and matrix products on these inputs: half of the
        operations that torch's counter counts. They are those of the forward as it runs, in which the first block of a
        stage leaves out the state, which is zero there.
    """
    # not under no_grad: there the counter, which follows the modules by hooks on gradients, stumbles over parameters
    # among their arguments, as the cells that `bench` compares with give them
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
