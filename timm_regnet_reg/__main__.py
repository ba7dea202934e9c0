"""The command line: ``python -m timm_regnet_reg COMMAND``, installed as ``regnet-reg COMMAND``, too."""

import argparse
import importlib
import os
import signal
import sys
from types import FrameType
from typing import List, NoReturn, Optional, Sequence

from . import __version__
from .commands import COMMANDS
from .errors import UserError

_DESCRIPTION = 'Regulated networks (RegNet, arXiv 2101.00590) for timm.'
_EPILOG = """\
regnet-reg COMMAND --help and regnet-reg help COMMAND give the details of a command.
The same as python -m timm_regnet_reg COMMAND.
"""


def _create_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser('regnet-reg', None, _DESCRIPTION, _EPILOG, formatter_class=formatter)
    parser.add_argument('--version', action='version', version=f'regnet-reg {__version__}')
    subparsers = parser.add_subparsers(title='commands', dest='command', metavar='COMMAND', required=True)
    for name in COMMANDS:
        command = importlib.import_module(f'.commands.{name}', __package__)
        description = (command.__doc__ or '').replace('``', '')
        subparser = subparsers.add_parser(
            name, help=description.partition('\n')[0], description=description, formatter_class=formatter
        )
        command.add_arguments(subparser)
        subparser.set_defaults(main=command.main)
    return parser


def _exit_on_signal(number: int, frame: Optional[FrameType]) -> NoReturn:
    sys.exit(128 + number)


def _prepare_process() -> None:
    """Whatever started this process: streams that take all text, and signals that let a command clean up."""
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:  # closed; a file of ours would take its number, and get C libraries' messages
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]
    for name in ('SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, _exit_on_signal)


def _output_failure(text: str = '') -> Optional[OSError]:
    """Write out what was printed, and `text`; if that fails drop it, as python would try again at exit, and say why."""
    failure = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            failure, text = error, ''
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failure


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or 'DefaultCPUAllocator' in str(error):  # how the CPU's allocator signs
        return True
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command.

    Args:
        argv: Command and its arguments. If None, those of the process, whose streams and signals are then prepared.

    Returns:
        Exit code: 0 on success, 1 after an error that a line on stderr tells, 130 after an interrupt, 141 when nobody
        reads the output any more.

    Raises:
        SystemExit: With code 2 on arguments that don't parse, 0 after ``--help``, 128 + its number after a signal, and
            whatever a script run by ``run`` exits with. Any other error of such a script passes through, too.
    """
    arguments: List[str] = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ['help']:
        arguments = [*arguments[1:2], '--help']

    # What follows the script belongs to the script. argparse would take some of it (--help, --) for its own.
    script_args: List[str] = []
    if arguments[:1] == ['run']:
        arguments, script_args = arguments[:2], arguments[2:]
    elif argv is None:
        _prepare_process()

    message, failure = '', None
    try:
        try:
            args = _create_parser().parse_args(arguments)
            if args.command != 'run':
                args.main(args)
        finally:
            failure = _output_failure()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except OSError:
        failure = failure or _output_failure('\n')  # nothing may be left to write: does anything go through?
        if failure is None:
            raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = f'out of memory ({str(error).partition(chr(10))[0]}); give a smaller batch or smaller images'
    if not message and failure is not None and not isinstance(failure, BrokenPipeError):
        message = f'the output cannot be written: {failure}'
    if message:
        # here, where the error's frames are gone, and their progress bars with them: the message starts a line
        print(f'regnet-reg: error: {message}', file=sys.stderr)
        return 1
    if failure is not None:
        return 141
    if args.command == 'run':  # here, where nothing is made of a script's errors
        args.args = script_args
        args.main(args)
    return 0


if __name__ == '__main__':
    sys.exit(main())
