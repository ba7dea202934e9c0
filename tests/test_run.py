"""The command line's frame, and `run`, which runs timm's own scripts.

The test that runs timm's real validate.py needs timm's scripts; see test_recipes.py.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
from test_recipes import train_script  # noqa: F401, a fixture

import timm_regnet_reg
from timm_regnet_reg import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]


def python(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def script(tmp_path):
    """Writes a script to a folder of its own."""

    def write(text, name='script.py'):
        path = tmp_path / 'scripts' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def in_process(monkeypatch):
    """The command line without a process of its own (and its second of imports); undoes what a script may leave."""
    monkeypatch.setattr(sys, 'argv', ['regnet-reg'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return lambda *args: command_line.main([str(arg) for arg in args])


# The frame


def exit_code(in_process, *args):
    with pytest.raises(SystemExit) as exit:
        in_process(*args)
    return exit.value.code


def test_overview_names_every_command_and_its_own_help_begins_alike(in_process, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')  # argparse breaks long lines, at hyphens too
    assert exit_code(in_process, 'help') == 0
    text = ' '.join(capsys.readouterr().out.split())
    for name in command_line.COMMANDS:
        line = importlib.import_module(f'timm_regnet_reg.commands.{name}').__doc__.partition('\n')[0]
        assert f' {name} {line}' in text
        assert exit_code(in_process, 'help', name) == 0
        text_of_command = capsys.readouterr().out
        assert text_of_command.startswith(f'usage: regnet-reg {name} ') and f'\n\n{line}\n\n' in text_of_command


def test_version_is_that_of_the_package(in_process, capsys):
    assert exit_code(in_process, '--version') == 0
    assert capsys.readouterr().out == f'regnet-reg {timm_regnet_reg.__version__}\n'


@pytest.mark.parametrize('args', [(), ('no-such-command',), ('help', 'no-such-command'), ('run',), ('run', 'no.py')])
def test_wrong_usage_exits_with_2(args, in_process, capsys):
    assert exit_code(in_process, *args) == 2
    error = capsys.readouterr().err
    assert 'usage: regnet-reg' in error and (args[1:] != ('no.py',) or "SCRIPT: there is no file 'no.py'" in error)
    assert args != ('run',) or error.endswith('required: SCRIPT\n')


# the frame alone, without the seconds that torch and timm take to import
STUB = """\
import os, signal, sys, time, types
sys.modules['torch'] = types.SimpleNamespace(get_num_threads=lambda: 2)
sys.modules['timm_regnet_reg'] = types.ModuleType('timm_regnet_reg')
vars(sys.modules['timm_regnet_reg']).update(__path__=[{path!r}], __version__='0')
from timm_regnet_reg import commands
from timm_regnet_reg.errors import UserError
def main(args):
    {body}
command = types.SimpleNamespace(__doc__='A stub.', add_arguments=lambda parser: None, main=main)
sys.modules['timm_regnet_reg.commands.quickstart'], commands.COMMANDS = command, ('quickstart',)
from timm_regnet_reg import __main__
sys.exit(__main__.main())
"""


@pytest.fixture
def process(script):
    """Runs `body` as the command `quickstart` in a process of its own, by a shell line with {command} in it."""

    def run(body, line='{command}', **env):
        path = script(STUB.format(path=str(ROOT / 'timm_regnet_reg'), body=body), name='regnet-reg')
        return subprocess.run(
            ['bash', '-c', 'set -o pipefail; ' + line.format(command=f'{sys.executable} {path} quickstart')],
            env={key: value for key, value in os.environ.items() if not key.startswith(('OMP_', 'GOMP_'))} | env,
            capture_output=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup, of these tests, ignores
        )

    return run


BAR = 'from tqdm import tqdm; bar = tqdm(total=2); bar.update(); '
BUFFERED = {'PYTHONUNBUFFERED': ''}  # as it is by default
SIGNAL = 'try: os.kill(os.getpid(), signal.{}); time.sleep(60)\n    finally: print("cleaned up")'


@pytest.mark.parametrize(
    'body, line, env, code, out, err',
    [
        ('print("all")', '{command}', {}, 0, 'all\n', ''),
        ('raise UserError("mend it")', '{command}', {}, 1, '', 'regnet-reg: error: mend it\n'),
        (BAR + 'raise UserError("mend it")', '{command}', {}, 1, '', '\nregnet-reg: error: mend it\n'),
        ('raise KeyboardInterrupt', '{command}', {}, 130, '', ''),
        ('raise ValueError("unforeseen")', '{command}', {}, 1, '', 'ValueError: unforeseen\n'),
        ('raise BrokenPipeError("of a connection")', '{command}', {}, 1, '\n', 'BrokenPipeError: of a connection\n'),
        ('print("x\\n" * 10**6)', '{command} | head -1', {}, 141, 'x\n', ''),
        ('print("x"); raise UserError("mend it")', '{command} | true', BUFFERED, 1, '', 'error: mend it\n'),
        ('print("x"); sys.exit(0)', '{command} | true', BUFFERED, 0, '', ''),
        ('print("all")', '{command} >&-', {}, 0, '', ''),
        ('print("all", file=sys.stderr); print("out")', '{command} 2>&-', {}, 0, 'out\n', ''),
        (BAR + 'raise UserError("mend it")', '{command} <&- >&- 2>&-', {}, 1, '', ''),
        ('print("\\udcff – é")', '{command}', {'PYTHONIOENCODING': 'ascii'}, 0, '\\udcff \\u2013 \\xe9\n', ''),
        ('print("\\udcff –")', '{command}', {'PYTHONIOENCODING': 'utf-8'}, 0, '\\udcff –\n', ''),
        (SIGNAL.format('SIGTERM'), '{command}', {}, 143, 'cleaned up\n', ''),
        (SIGNAL.format('SIGHUP'), '{command}', {}, 129, 'cleaned up\n', ''),
    ],
)
def test_whatever_happens_ends_in_a_line_and_an_exit_code(body, line, env, code, out, err, process):
    result = process(body, line, **env)
    assert (result.returncode, result.stdout) == (code, out)
    assert result.stderr == err if not err else err in result.stderr
    assert ('Traceback' in result.stderr) == (err.endswith(('unforeseen\n', 'connection\n')))


def test_hangup_is_ignored_under_nohup(process):
    result = process('os.kill(os.getpid(), signal.SIGHUP); print("goes on")', 'nohup {command}')
    assert (result.returncode, result.stdout) == (0, 'goes on\n')


@pytest.mark.skipif(sys.platform != 'linux', reason='the OpenMP of torch on Linux alone waits in that way')
@pytest.mark.parametrize(
    'env, expected',
    [
        ({}, 'None 5000'),
        ({'OMP_WAIT_POLICY': 'active'}, 'active None'),
        ({'GOMP_SPINCOUNT': '1000'}, 'None 1000'),
    ],
)
def test_threads_that_wait_leave_the_cores_to_others_unless_the_user_says_otherwise(env, expected, process):
    result = process('print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))', **env)
    assert (result.returncode, result.stdout, result.stderr) == (0, f'{expected}\n', '')


# The package


@pytest.mark.parametrize(
    'version, warned',
    [('1.0.29.dev0', True), ('1.0.31.dev0', True), ('1.0.9', True), ('1.0.31', False), ('1.0.32.dev0', False)],
)
def test_import_warns_of_a_timm_that_is_too_old(version, warned, monkeypatch):
    monkeypatch.setattr(timm, '__version__', version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        importlib.reload(timm_regnet_reg)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warned
    assert all(message.startswith(f'timm {version} was imported, from ') for message in messages)


def test_timm_that_is_too_old_is_the_one_that_the_package_does_not_require():
    requirements = re.search(r'^dependencies = \[(.*?)\]', (ROOT / 'pyproject.toml').read_text(), re.M | re.S)[1]
    assert f'"timm>={timm_regnet_reg.OLDEST_TIMM}"' in requirements


# run


def test_script_is_main_with_its_arguments_untouched_and_finds_its_neighbors(in_process, script, capsys):
    script('name = "neighbor"', name='regnet_reg_neighbor.py')
    path = script(
        'import json, sys, regnet_reg_neighbor\n'
        'print(json.dumps([regnet_reg_neighbor.name, __name__, __file__, sys.modules["__main__"].__file__, *sys.argv]))'
    )
    args = ['--model', 'x', '-h', '--help', '--', '-1', 'run', 'a b', '', '--scale=0.5', '--', '@file', '*']
    assert in_process('run', path, *args) == 0
    assert json.loads(capsys.readouterr().out) == ['neighbor', '__main__', *[str(path)] * 3, *args]


@pytest.mark.parametrize('error', ['timm_regnet_reg.errors.UserError', 'KeyboardInterrupt', 'OSError', 'SystemExit'])
def test_errors_that_the_command_line_knows_are_still_the_scripts(error, in_process, script):
    path = script(f'import timm_regnet_reg.errors\nraise {error}("from the script")\n')
    with pytest.raises(eval(error), match='from the script'):
        in_process('run', path)


WORKING = """\
import multiprocessing, os, sys
def work(x):
    return 2 * x
if __name__ == '__main__':
    import timm
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        told = (os.environ['RANK'], timm.is_model('cifar_resnet20'), pool.apply(work, (21,)), *sys.argv[1:])
    sys.stdout.write(f'{told}\\n')  # at once, as the processes share their output
"""


def test_script_sees_the_models_and_starts_workers_in_every_process_of_torchrun(script):
    """A worker that starts afresh (as data loaders do where there's no fork) looks its function up in the script."""
    launch = '-m torch.distributed.run --standalone --nproc_per_node=2 -m timm_regnet_reg run'
    result = python(*launch.split(), script(WORKING), '--config', 'x')
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"('{rank}', True, 42, '--config', 'x')" for rank in range(2)]


def test_timms_validate_runs_with_our_models(train_script, packaged, image_folder):  # noqa: F811
    command = ['-m', 'timm_regnet_reg', 'run', train_script.with_name('validate.py'), '--data-dir', image_folder]
    options = '--pretrained --device cpu --workers 1 --batch-size 2 --model'
    result = python(*command, *options.split(), f'local-dir:{packaged}')
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.split('--result')[1])['param_count'] > 0.3
