"""What a network is made of and what it does, in figures."""

from typing import Any, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode


@torch.inference_mode()
def count(name: str, input_size: Tuple[int, ...] = (), **kwargs: Any) -> Tuple[int, int]:
    """A model's parameters, and the multiply-adds of its convolutions and matrix products on one image (of its size).

    These are half of the operations that torch's counter counts, in the forward as it runs: the first block of a stage
    leaves out the state, which is zero there. On torch's device `meta`, where nothing has data.
    """
    model = timm.create_model(name, device='meta', **kwargs).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *(input_size or model.default_cfg['input_size']), device='meta'))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
