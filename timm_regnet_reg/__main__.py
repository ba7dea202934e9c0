"""The command line: ``python -m timm_regnet_reg COMMAND``, installed as ``regnet-reg COMMAND``, too."""

import argparse
import importlib
import os
import signal
import sys
from typing import Optional, Sequence

import torch

from . import __version__
from .commands import COMMANDS
from .errors import UserError

# commands that compute for long where there is no GPU
ON_CPU = ('quickstart', 'classify', 'package', 'export', 'similarity')


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'regnet-reg',
        description='Regulated networks (RegNet, arXiv 2101.00590) for timm.',
        epilog='regnet-reg COMMAND --help, or regnet-reg help COMMAND, gives the details of a command.',
    )
    parser.add_argument('--version', action='version', version=f'regnet-reg {__version__}')
    subparsers = parser.add_subparsers(title='commands', dest='command', metavar='COMMAND', required=True)
    for name in COMMANDS:
        command = importlib.import_module(f'.commands.{name}', __package__)
        about = command.__doc__ or ''
        subparser = subparsers.add_parser(
            name, help=about.partition('\n')[0], description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(subparser)
        subparser.set_defaults(main=command.main)
    return parser


def _prepare_process() -> None:
    """Whatever started this process: streams that take all text, and signals that let a command clean up."""
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:  # closed; a file of ours would take its number, and get C libraries' messages
            setattr(sys, name, open(os.devnull, mode))
        getattr(sys, name).reconfigure(errors='backslashreplace')
    for name in ('SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def _spare_the_cores(args: argparse.Namespace) -> None:
    """Starts this process again, as torch settles on import how long OpenMP's threads spin before they sleep.

    If they spin for milliseconds, a step of training takes ten times as long beside other work; if they sleep at once
    (OMP_WAIT_POLICY=passive), twice as long on an idle machine.
    """
    on_cpu = args.command in ON_CPU and getattr(args, 'device', 'cpu') == 'cpu' and torch.get_num_threads() > 1
    if sys.platform == 'linux' and on_cpu and not os.environ.keys() & {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'}:
        os.environ['GOMP_SPINCOUNT'] = '5000'
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _flush(text: str = '') -> bool:
    """Whether what was printed, and `text`, is read; if nobody reads it, it is dropped, as python would try again."""
    try:
        print(end=text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a command, with its arguments, or that of the process, whose streams and signals are then prepared.

    Returns the exit code: 0 on success, 1 after an error that a line on stderr tells, 130 after an interrupt, 141 when
    nobody reads the output any more. SystemExit carries 2 for arguments that don't parse and 128 + its number after a
    signal. Whatever a script run by ``run`` raises passes through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ['help']:
        arguments = [*arguments[1:2], '--help']
    if arguments[:1] == ['run']:  # argparse would take some of the script's arguments (--help, --) for its own
        args = _create_parser().parse_args(arguments[:2])
        args.args = arguments[2:]
        args.main(args)
        return 0
    if argv is None:
        _prepare_process()

    try:
        args = _create_parser().parse_args(arguments)
        if argv is None:
            _spare_the_cores(args)
        args.main(args)
        return 0 if _flush() else 141
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if _flush('\n'):  # a connection's
            raise
        return 141
    except SystemExit:
        _flush()
        raise
    _flush()
    # here, where the error's frames are gone, and their progress bars with them: the message starts a line
    print(f'regnet-reg: error: {message}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
