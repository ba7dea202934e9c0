"""Tables as Markdown has them, and what figures are drawn with."""

import importlib.util
from typing import List, Sequence

from ..errors import UserError


def row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def header(columns: Sequence[str], texts: int = 1) -> List[str]:
    """A table's first two lines: so many columns of texts, then columns of figures."""
    return [row(columns), f'|{"---|" * texts}{"---:|" * (len(columns) - texts)}']


def check_matplotlib() -> None:
    """Raises a UserError if matplotlib is missing, before anything has been computed in vain."""
    if importlib.util.find_spec('matplotlib') is None:
        raise UserError('the figures are drawn with matplotlib, which is missing; pip install "timm-regnet-reg[plots]"')
