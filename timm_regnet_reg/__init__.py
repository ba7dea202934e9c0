"""RegNet, the self-regulated network, for timm: importing this package registers its models.

import timm, timm_regnet_reg
model = timm.create_model('regnet_reg_resnet50_convlstm')
"""

import os
import warnings

import timm
from packaging.version import Version

__version__ = '0.5.3'
__all__ = ['regulate', 'set_fused']

OLDEST_TIMM = '1.0.31'

if Version(timm.__version__) < Version(OLDEST_TIMM):
    warnings.warn(
        f'timm {timm.__version__} was imported, from {os.path.dirname(timm.__file__)}, but timm-regnet-reg needs '
        f'{OLDEST_TIMM} or later. A script that lies beside a timm folder imports that one: copy the script '
        'elsewhere, or run it by `python -m timm_regnet_reg run SCRIPT`',
        stacklevel=2,
    )

from . import regnet_reg as regnet_reg  # noqa: E402
from .fused import set_fused  # noqa: E402
from .regulate import regulate  # noqa: E402
