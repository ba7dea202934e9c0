"""The networks that `bench` compares: plain, regulated, and regulated as others write it."""

from typing import Any, Dict, Iterable, Optional

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import RegulatedStage
from ..cells import CELLS, ConvLSTM
from ..equations import Kernels, State

PLAIN = 'plain'


class NaiveConvLSTM(ConvLSTM):
    """The ConvLSTM as its equations are written: two convolutions a gate, and everything kept for backward."""

    def forward(self) -> Kernels:
        return [self.pointwise, self.depthwise, self.bias]

    @staticmethod
    def step(X: Tensor, H: Optional[Tensor], C: Optional[Tensor], W: Kernels) -> State:
        """As equations.convlstm, but W is the cell's three parameters."""
        if H is None or C is None:
            H = C = torch.zeros_like(X)

        def conv(pointwise: Tensor, depthwise: Tensor, bias: Tensor) -> Tensor:
            pairs = torch.stack([X, H], dim=2).flatten(1, 2)  # X_0, H_0, X_1, H_1, …
            fused = F.conv2d(pairs, pointwise, groups=X.shape[1])
            return F.conv2d(fused, depthwise, bias, padding=1, groups=X.shape[1])

        i, f, o, g = (conv(*w) for w in zip(*(w.chunk(4) for w in W)))
        C = torch.sigmoid(f) * C + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(C), C


class DenseConvRNN(nn.Module):
    """H' = tanh(W * [X, H]) with one 3x3 convolution of 2N to N channels."""

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self) -> Kernels:
        return [self.conv.weight, self.conv.bias]

    @staticmethod
    def step(X: Tensor, H: Optional[Tensor], C: Optional[Tensor], W: Kernels) -> State:
        """X and H (B, N, height, width) to the new H."""
        weight, bias = W
        H = torch.zeros_like(X) if H is None else H
        return torch.tanh(F.conv2d(torch.cat([X, H], dim=1), weight, bias, padding=1)), C


BASELINES: Dict[str, Any] = {'naive-convlstm': NaiveConvLSTM, 'dense-convrnn': DenseConvRNN}


def create_networks(backbone: str, names: Iterable[str], device: Any = None) -> Dict[str, nn.Module]:
    """In channels_last, networks with a `backbone` ('resnet20', …): `PLAIN`, or with a cell or one of `BASELINES`."""
    models: Dict[str, nn.Module] = {}
    for name in names:
        cell, kwargs = (name, {}) if name in CELLS else ('convlstm', {'regulated_stages': ()})
        model = timm.create_model(f'regnet_reg_{backbone}_{cell}', device=device, **kwargs)
        if name in BASELINES:
            for child, stage in list(model.named_children()):
                if child.startswith('layer') and len(stage):
                    setattr(model, child, RegulatedStage(stage, BASELINES[name], nn.BatchNorm2d))
        models[name] = model.to(memory_format=torch.channels_last)
    return models
