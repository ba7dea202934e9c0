"""What commands that plot check before they work."""

import importlib.util
import tempfile
from pathlib import Path

from ..errors import UserError

__all__ = ['plot_folder']


def plot_folder(name: str) -> Path:
    """The folder that figures and tables go to, made if need be, before anything has been computed in vain.

    Raises:
        UserError: matplotlib is missing, or the folder can't be written to.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise UserError('the figures are drawn with matplotlib, which is missing; pip install "timm-regnet-reg[plots]"')
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f'{name}: cannot be written to ({error}); give another folder') from error
    return folder
