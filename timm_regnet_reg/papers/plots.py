"""What commands that plot check before they work."""

import importlib.util

from ..errors import UserError

__all__ = ['check_matplotlib']


def check_matplotlib() -> None:
    """Raises a UserError if matplotlib is missing, before anything has been computed in vain."""
    if importlib.util.find_spec('matplotlib') is None:
        raise UserError('the figures are drawn with matplotlib, which is missing; pip install "timm-regnet-reg[plots]"')
