"""`quickstart`: the real tour on fewer images, and what it says when it can't go on."""

import re
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import MODEL
from timm.data import create_transform, resolve_data_config

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.commands import quickstart as command
from timm_regnet_reg.commands.quickstart import Digits, quickstart
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.weights.folder import FILES, check_folder

CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
NAME = f'{MODEL}.digits'


@pytest.fixture
def short(monkeypatch):
    """Few held-out images."""
    monkeypatch.setattr(command, 'HELD_OUT', 20)


def test_the_whole_tour(tmp_path, capsys):
    folder = quickstart(tmp_path / 'new', epochs=1, max_images=640)
    out, err = capsys.readouterr()
    assert re.findall(r'^(\d/\d) ', out, re.MULTILINE) == ['1/5', '2/5', '3/5', '4/5', '5/5']
    assert len(re.findall(rf'^ +[\d.]+ %  ({"|".join(CIFAR10)})$', out, re.MULTILINE)) == 3
    assert '20/20' in err  # the progress bar's batches

    # it learned
    images, before, after = re.search(r'on (\d+) held-out digits: ([\d.]+) % before, ([\d.]+) % after', out).groups()
    assert int(images) == 360
    assert float(before) < 25
    assert float(after) > 40

    # what it left holds what it said, and loads
    assert folder == tmp_path / 'new' / NAME
    assert {path.name for path in folder.iterdir()} == {*FILES}
    metrics = {result.metric_name: result.metric_value for result in check_folder(folder).card.data.eval_results}
    assert metrics['Top-1 accuracy'] == pytest.approx(float(after), abs=0.06)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == Digits.label_names
    assert model.pretrained_cfg['tag'] == 'digits'

    # and classifies
    digits = command._load_samples()[2]
    digits.transform = create_transform(**resolve_data_config(model=model), is_training=False)
    paths = [tmp_path / f'{i}.png' for i in range(10)]
    for path, image in zip(paths, digits.images):
        image.save(path)
    assert main(['classify', '--model', f'local-dir:{folder}', '--topk', '1', *map(str, paths)]) == 0
    found = re.findall(r'%  (\d)$', capsys.readouterr().out, re.MULTILINE)
    expected = check_folder(folder).model(torch.stack([digits[i][0] for i in range(10)])).argmax(1)
    assert found == [str(digit) for digit in expected.tolist()]


def test_digits_are_split_without_overlap_and_keep_their_labels():
    from sklearn.datasets import load_digits

    photograph, train, held_out = command._load_samples()
    assert photograph.mode == 'RGB' and min(photograph.size) > 200
    assert (len(train), len(held_out)) == (1437, 360)
    assert set(held_out.labels) == set(range(10))
    images = train.images + held_out.images
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted(zip((pixels * (255 / 16)).astype('uint8').tolist(), labels.tolist()))
    found = [np.asarray(image)[..., 0].ravel().tolist() for image in images]
    found = sorted(zip(found, train.labels + held_out.labels))
    assert found == expected


def test_an_earlier_result_is_replaced_but_nothing_else(tmp_path, short, monkeypatch):
    folder = quickstart(tmp_path, epochs=1, max_images=32)
    first = (folder / 'model.safetensors').read_bytes()
    quickstart(tmp_path, epochs=1, max_images=64)
    assert (folder / 'model.safetensors').read_bytes() != first

    (folder / 'thesis.txt').write_text('precious')
    monkeypatch.setattr(command, '_fine_tune', lambda *args: pytest.fail('the work began'))
    with pytest.raises(UserError, match='thesis.txt'):
        quickstart(tmp_path, epochs=1, max_images=32)
    assert {path.name for path in folder.iterdir()} == {*FILES, 'thesis.txt'}


@pytest.mark.parametrize('output, message', [('/proc/new', 'cannot be written'), ('n' * 300, 'cannot be written')])
def test_place_that_cannot_be_written_is_told_before_the_work(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, '_fine_tune', lambda *args: pytest.fail('the work began'))
    with pytest.raises(UserError, match=message):
        quickstart(output)
    assert not list(tmp_path.iterdir())


def test_outputs_that_differ_after_loading_are_an_error(tmp_path, short, monkeypatch):
    create_model = timm.create_model

    def create_another(name, *args, **kwargs):
        model = create_model(name, *args, **kwargs)
        if name.endswith(NAME):
            model.fc.bias.data[3] += 1e-4
        return model

    monkeypatch.setattr(timm, 'create_model', create_another)
    with pytest.raises(RuntimeError, match='not the one that was saved'):
        quickstart(tmp_path, epochs=1, max_images=32)


def test_missing_scikit_learn_names_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert main(['quickstart', '--output', str(tmp_path)]) == 1
    assert 'pip install "timm-regnet-reg[quickstart]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_says_what_it_does_and_where_the_result_goes(capsys):
    with pytest.raises(SystemExit):
        main(['quickstart', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'handwritten digits' in text and f'{NAME}/ goes' in text
