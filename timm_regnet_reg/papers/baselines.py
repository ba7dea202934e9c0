"""The networks that `bench` compares: plain, regulated, and regulated as others write it."""

from typing import Any, Dict, List, Optional

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..blocks import RegulatedStage
from ..cells import CELLS, ConvLSTM
from ..equations import Kernels, State
from ..errors import UserError
from ..regnet_reg import BACKBONES, CIFAR_BACKBONES

__all__ = ['DENSE', 'NAIVE', 'PLAIN', 'DenseConvRNN', 'NaiveConvLSTM', 'Regulators', 'networks', 'regulator_inputs']

PLAIN, NAIVE, DENSE = 'plain', 'naive convlstm', 'dense convrnn'


class NaiveConvLSTM(ConvLSTM):
    """The ConvLSTM as its equations are written: two convolutions a gate, and everything kept for backward."""

    def forward(self) -> Kernels:
        return [self.pointwise, self.depthwise, self.bias]

    @staticmethod
    def step(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        """As equations.convlstm, but W is the cell's three parameters."""
        if H is None or C is None:
            H = C = torch.zeros_like(X)

        def conv(pointwise: torch.Tensor, depthwise: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
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
    def step(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        """X and H (B, N, height, width) to the new H."""
        H = torch.zeros_like(X) if H is None else H
        weight, bias = W
        return torch.tanh(F.conv2d(torch.cat([X, H], dim=1), weight, bias, padding=1)), C


class Regulators(nn.Module):
    """The regulators of a network without their network: each runs as many steps as its stage has blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        stages = _regulated_stages(model)
        self.cells = nn.ModuleList(stage.regulator for stage in stages)
        self.steps = [len(stage) for stage in stages]

    def forward(self, *Xs: torch.Tensor) -> List[torch.Tensor]:
        """The input X of each stage, (B, N, height, width), to the last H of each."""
        Hs = []
        for cell, steps, X in zip(self.cells, self.steps, Xs):
            W = cell()
            H, C = cell.step(X, None, None, W)
            for _ in range(steps - 1):
                H, C = cell.step(X, H, C, W)
            Hs.append(H)
        return Hs


def _regulated_stages(model: nn.Module) -> List[RegulatedStage]:
    return [stage for stage in model.children() if isinstance(stage, RegulatedStage)]


def regulator_inputs(model: nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """Random numbers in the shape that each regulator of the network reads for these images."""
    shapes: List[torch.Size] = []
    hooks = [
        stage[0].regulator_bn.register_forward_hook(lambda bn, inputs, output: shapes.append(output.shape[1:]))
        for stage in _regulated_stages(model)
    ]
    with torch.no_grad():
        model.eval()(images[:1])
    for hook in hooks:
        hook.remove()
    return [torch.randn(len(images), *shape, device=images.device) for shape in shapes]


def networks(backbone: str, device: Any = None) -> Dict[str, nn.Module]:
    """The networks to compare, by name: plain, one with each cell, naive and dense.

    Args:
        backbone: 'resnet20', 'resnet50', …
        device: Where they are to be.

    Raises:
        UserError: Unknown backbone.
    """
    known = [*CIFAR_BACKBONES, *BACKBONES]
    if backbone not in known:
        raise UserError(f'unknown backbone {backbone!r}: choose one of {", ".join(known)}')

    def plain() -> nn.Module:
        return timm.create_model(f'regnet_reg_{backbone}_convlstm', regulated_stages=(), device=device)

    models = {PLAIN: plain()}
    for cell in CELLS:
        models[cell] = timm.create_model(f'regnet_reg_{backbone}_{cell}', device=device)
    for name, cell_class in ((NAIVE, NaiveConvLSTM), (DENSE, DenseConvRNN)):
        models[name] = plain()
        for child, stage in list(models[name].named_children()):
            if child.startswith('layer'):
                setattr(models[name], child, RegulatedStage(stage, cell_class, nn.BatchNorm2d))
    return models
