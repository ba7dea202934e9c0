"""Turns the fused steps on when it is imported: `train.py --device-modules timm_regnet_reg.fused.enable`."""

from . import set_fused

set_fused()
