"""The command line's frame, and `run`, which runs timm's own scripts.

One test runs timm's real validate.py, from the folder of the script that the environment variable TIMM_TRAIN_SCRIPT
names (see test_recipes.py), and is skipped when that isn't set.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_regnet_reg import __main__ as command_line
from timm_regnet_reg.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def python(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )


def regnet_reg(*args):
    return python('-m', 'timm_regnet_reg', *args)


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


def test_help_names_every_command_with_the_help_line_of_its_module(in_process, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')  # argparse breaks long lines, at hyphens too
    with pytest.raises(SystemExit) as exit:
        in_process('--help')
    assert exit.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    for name, line in command_line.COMMANDS.items():
        assert f' {name} {line}' in text
        module = importlib.import_module(f'timm_regnet_reg.{name}')
        assert module.__doc__.splitlines()[0] == line


def test_overview_imports_no_command(in_process, monkeypatch):
    modules = {f'timm_regnet_reg.{name}' for name in command_line.COMMANDS}
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit):
        in_process('--help')
    assert not modules & set(sys.modules)


@pytest.mark.parametrize('args', [(), ('no-such-command',), ('run',), ('run', '--no-such-option')])
def test_wrong_usage_exits_with_2(args, in_process, capsys):
    with pytest.raises(SystemExit) as exit:
        in_process(*args)
    assert exit.value.code == 2
    assert 'usage: regnet-reg' in capsys.readouterr().err


@pytest.mark.parametrize(
    'error, code, message',
    [
        (UserError('mend it'), 1, 'regnet-reg: error: mend it\n'),
        (KeyboardInterrupt(), 130, ''),
    ],
)
def test_error_of_a_command_is_told_in_a_line_and_by_the_exit_code(
    error,
    code,
    message,
    in_process,
    monkeypatch,
    capsys,
    script,
):
    def fail(args):
        raise error

    monkeypatch.setattr('timm_regnet_reg.commands.run.main', fail)
    assert in_process('run', script('')) == code
    assert capsys.readouterr().err == message


# run


def test_help_of_run_is_its_own_without_a_script(in_process, capsys):
    with pytest.raises(SystemExit) as exit:
        in_process('run', '--help')
    assert exit.value.code == 0
    assert 'usage: regnet-reg run [-h] SCRIPT [ARGS ...]' in capsys.readouterr().out


def test_missing_script_is_told(in_process, tmp_path, capsys):
    missing = tmp_path / 'validate.py'
    assert in_process('run', missing) == 1
    assert f"regnet-reg: error: no script '{missing}'" in capsys.readouterr().err


def test_script_gets_its_arguments_untouched(in_process, script, capsys):
    path = script('import json, sys; print(json.dumps(sys.argv))')
    args = ['--model', 'x', '-h', '--help', '--', '-1', 'run', 'a b', '', '--scale=0.5', '--', '@file', '*']
    assert in_process('run', path, *args) == 0
    assert json.loads(capsys.readouterr().out) == [str(path), *args]


def test_script_finds_its_neighbors_and_is_main(in_process, script, capsys):
    script('name = "neighbor"', name='regnet_reg_neighbor.py')
    path = script(
        'import sys, regnet_reg_neighbor\n'
        'print(regnet_reg_neighbor.name, __name__, __file__, sys.modules["__main__"].__file__)',
    )
    assert in_process('run', path) == 0
    assert capsys.readouterr().out.split() == ['neighbor', '__main__', str(path), str(path)]


@pytest.mark.parametrize('code', [None, 0, 3, 'a message'])
def test_exit_of_the_script_passes_through(code, in_process, script):
    with pytest.raises(SystemExit) as exit:
        in_process('run', script(f'import sys; sys.exit({code!r})'))
    assert exit.value.code == code


def test_traceback_shows_the_scripts_frames(script):
    path = script('def deep():\n    raise ValueError("from the script")\n\ndeep()\n')
    result = regnet_reg('run', path)
    assert result.returncode == 1
    assert f'File "{path}", line 4, in <module>' in result.stderr
    assert f'File "{path}", line 2, in deep' in result.stderr
    assert result.stderr.splitlines()[-1] == 'ValueError: from the script'


@pytest.mark.parametrize('error, code', [('timm_regnet_reg.errors.UserError', 1), ('KeyboardInterrupt', 130)])
def test_errors_that_the_command_line_knows_are_still_the_scripts(error, code, in_process, script, capsys):
    path = script(f'import timm_regnet_reg.errors\nraise {error}("from the script")\n')
    with pytest.raises(SystemExit) as exit:
        in_process('run', path)
    assert exit.value.code == code
    stderr = capsys.readouterr().err
    assert f'File "{path}", line 2, in <module>' in stderr
    assert stderr.splitlines()[-1] == f'{error}: from the script'


def test_script_sees_the_models_starts_workers_and_exits_with_its_code(script):
    """A worker that starts afresh (as data loaders do where there's no fork) looks its function up in the script."""
    path = script(
        'import multiprocessing\n'
        'def work(x):\n'
        '    return 2 * x\n'
        'if __name__ == "__main__":\n'
        '    import timm\n'
        '    print(timm.is_model("regnet_reg_resnet20_convlstm"))\n'
        '    with multiprocessing.get_context("spawn").Pool(1) as pool:\n'
        '        print(pool.apply(work, (21,)))\n'
        '    raise SystemExit(3)\n',
    )
    result = regnet_reg('run', path)
    assert (result.returncode, result.stdout.split()) == (3, ['True', '42']), result.stderr


def test_torchrun_runs_the_script_in_every_process(script):
    path = script('import os, sys, timm; print(os.environ["RANK"], timm.is_model("cifar_resnet20"), sys.argv[1:])')
    result = python(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '-m',
        'timm_regnet_reg',
        'run',
        path,
        '--config',
        'x',
    )
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert lines == [f"{rank} True ['--config', 'x']" for rank in range(2)]


def test_timms_validate_runs_with_our_models(tmp_path):
    train_script = os.environ.get('TIMM_TRAIN_SCRIPT')
    validate_script = Path(train_script).with_name('validate.py') if train_script else None
    if validate_script is None or not validate_script.is_file():
        reason = f'no validate.py beside TIMM_TRAIN_SCRIPT ({train_script})'
        print(reason)
        pytest.skip(reason)
    for label in range(2):
        folder = tmp_path / 'validation' / str(label)
        folder.mkdir(parents=True)
        Image.new('RGB', (32, 32), (100 * label,) * 3).save(folder / '0.png')
    checkpoint = tmp_path / 'checkpoint.pth'
    torch.save(timm.create_model('regnet_reg_resnet20_convlstm').state_dict(), checkpoint)

    result = regnet_reg(
        'run',
        validate_script,
        '--model',
        'regnet_reg_resnet20_convlstm',
        '--data-dir',
        tmp_path,
        '--checkpoint',
        checkpoint,
        '--device',
        'cpu',
        '--workers',
        '1',
        '--batch-size',
        '2',
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.split('--result')[1])['param_count'] > 0.3
