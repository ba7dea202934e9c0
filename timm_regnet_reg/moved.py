"""Modules of version 0.1.0 that are no more: they can still be imported, and have the names that they had."""

import importlib
import sys
from types import ModuleType
from typing import Any, Dict, Tuple

__all__ = ['HOMES', 'Moved']

# module: where its names are now
HOMES: Dict[str, Tuple[str, ...]] = {
    'bench': ('support.rivals', 'support.measuring', 'commands.bench'),
    'classify': ('arguments', 'support.inference', 'commands.classify'),
    'eager': ('equations',),
    'export': ('commands.export',),
    'package': ('support.folder', 'support.scoring', 'commands.package'),
    'publish': ('commands.publish',),
    'quickstart': ('commands.quickstart',),
    'run': ('commands.run',),
    'table': ('support.counting', 'commands.table'),
}


class Moved(ModuleType):
    """A module whose names are looked up in their new homes, which are imported only then."""

    def __getattr__(self, name: str) -> Any:
        package, _, module = self.__name__.rpartition('.')
        if not name.startswith('__'):  # tools ask every module in sys.modules for those
            for home in HOMES[module]:
                found = importlib.import_module(f'.{home}', package)
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')


for _name in HOMES:
    _module = Moved(f'{__package__}.{_name}', f'See {", ".join(HOMES[_name])}.')
    sys.modules[_module.__name__] = _module
    setattr(sys.modules[__package__], _name, _module)
