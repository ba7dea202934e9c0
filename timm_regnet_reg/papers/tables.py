"""Tables as Markdown has them."""

from typing import List, Sequence

__all__ = ['header', 'row']


def row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def header(columns: Sequence[str], texts: int = 1) -> List[str]:
    """A table's first two lines: so many columns of texts, then columns of figures."""
    return [row(columns), f'|{"---|" * texts}{"---:|" * (len(columns) - texts)}']
