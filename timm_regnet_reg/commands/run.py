"""Run one of timm's own scripts with these models registered.

For scripts that know timm's models only, such as validate.py, benchmark.py, inference.py and onnx_export.py of a clone
of timm's repository:

    regnet-reg run validate.py --model regnet_reg_resnet20_convlstm --data-dir DIR
    torchrun --nproc_per_node=2 -m timm_regnet_reg run train.py --config ...

The script gets its arguments, --help among them, as it would from python, and its exit code and traceback are passed
on. (train.py can do without: --device-modules timm_regnet_reg registers the models, as the recipes do.)

A script that starts new Python programs, as bulk_runner.py does, has to start those with run, too: give bulk_runner.py
`-m on timm_regnet_reg run benchmark.py`. timm is the one that this package was imported with, also where the script
lies beside a timm folder of its own.
"""

import argparse
import os
import runpy
import sys


def _script(text: str) -> str:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"there is no file {text!r}; give a script, such as timm's validate.py")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('script', type=_script, metavar='SCRIPT', help='path of the script')
    # for the help text: what follows the script never reaches argparse
    parser.add_argument('args', metavar='ARGS', nargs='*', default=[], help='arguments of the script')


def main(args: argparse.Namespace) -> None:
    """Runs the script as ``python SCRIPT ARGS`` does; whatever it raises passes through, SystemExit included."""
    sys.argv = [args.script, *args.args]
    if not getattr(sys.flags, 'safe_path', False):  # Python 3.11 and later: -P
        sys.path[0] = os.path.dirname(os.path.realpath(args.script))
    runpy.run_path(args.script, run_name='__main__')
