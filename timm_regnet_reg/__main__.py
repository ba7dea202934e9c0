"""The command line: ``python -m timm_regnet_reg COMMAND``, installed as ``regnet-reg COMMAND``, too."""

import argparse
import importlib
import inspect
import sys
from typing import List, Optional

from .arguments import COMMANDS
from .errors import UserError

_DESCRIPTION = 'Regulated networks (RegNet, arXiv 2101.00590) for timm.'
_EPILOG = """\
regnet-reg COMMAND --help says more of a command.
The same as python -m timm_regnet_reg COMMAND.
"""


def _doc(module) -> str:
    """A module's docstring as help text: its reST literals lose their double backquotes."""
    return inspect.getdoc(module).replace('``', '')


def _create_parser(command: Optional[str]) -> argparse.ArgumentParser:
    """The parser of all commands, of which only `command` knows its arguments."""
    parser = argparse.ArgumentParser(
        prog='regnet-reg',
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title='commands', dest='command', metavar='COMMAND', required=True)
    for name, (line, add_arguments) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=line,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            module = importlib.import_module(f'.commands.{name}', __package__)
            subparser.description = _doc(module)
            add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command.

    Args:
        argv: Command and its arguments; those of the process if None.

    Returns:
        Exit code: 0 on success, 1 after a `UserError`, which is told in a line on stderr, 130 after an interrupt.

    Raises:
        SystemExit: With code 2 on arguments that don't parse, 0 after ``--help``, and whatever a script run by
            ``run`` exits with.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv else None

    # What follows the script belongs to the script. argparse would take some of it (--help, --) for its own.
    script_args = []
    if command == 'run':
        argv, script_args = argv[:2], argv[2:]

    try:
        args = _create_parser(command).parse_args(argv)
        if command == 'run':
            args.args = script_args
        args.main(args)
    except UserError as error:
        print(f'regnet-reg: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
