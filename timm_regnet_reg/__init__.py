"""RegNet, the self-regulated network, for timm: importing this package registers its models.

import timm, timm_regnet_reg
model = timm.create_model('regnet_reg_resnet50_convlstm')
"""

from . import regnet_reg as regnet_reg
from .networks import regulate

__version__ = '0.1.0'
__all__ = ['regulate']
