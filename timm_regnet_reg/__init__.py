"""RegNet, the self-regulated network, for timm: importing this package registers its models.

import timm, timm_regnet_reg
model = timm.create_model('regnet_reg_resnet50_convlstm')
"""

import importlib
import os
import sys
import warnings
from typing import Any

from . import moved as moved

__version__ = '0.2.0'
__all__ = ['regulate']

OLDEST_TIMM = '1.0.31'


def register() -> None:
    """Register the models with timm, and warn of a timm that is too old for them."""
    import timm
    from packaging.version import Version

    if Version(timm.__version__) < Version(OLDEST_TIMM):
        warnings.warn(
            f'timm {timm.__version__} was imported, from {os.path.dirname(timm.__file__)}, but timm-regnet-reg needs '
            f'{OLDEST_TIMM} or later. A script that lies beside a timm folder imports that one: copy the script '
            'elsewhere, or run it by `python -m timm_regnet_reg run SCRIPT`',
            stacklevel=2,
        )
    importlib.import_module('.regnet_reg', __name__)


def _is_command_line() -> bool:
    """Whether this is the process of `python -m timm_regnet_reg` or of the script `regnet-reg`, at its start."""
    if sys.argv[:1] == ['-m']:  # which python sets while it looks for the module; that one follows the options
        return sys.orig_argv[-len(sys.argv)] == __name__
    main = getattr(sys.modules.get('__main__'), '__file__', None) or ''
    return os.path.basename(main) == 'regnet-reg'


# The command line registers when a command runs: help and mistakes don't wait the seconds that torch takes.
if not _is_command_line():
    register()
    from .networks import regulate


def __getattr__(name: str) -> Any:
    """What a process that began as the command line has not imported at its start."""
    if name in __all__:
        return getattr(importlib.import_module('.networks', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
