"""`quickstart`: the real tour on fewer images, and what it says when it can't go on."""

import re
import sys

import numpy as np
import pytest
import timm
from conftest import MODEL

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.commands import quickstart as command
from timm_regnet_reg.weights.folder import check_folder

CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
NAME = f'{MODEL}.digits'


@pytest.fixture
def quickstart(tmp_path, monkeypatch, capsys):
    """Runs the command for an epoch, on so many images. Returns exit code, stdout and stderr."""
    load_samples = command._load_samples

    def run(images, held_out=20):
        photograph, train, test = load_samples()
        del train[images:], test[held_out:]
        monkeypatch.setattr(command, '_load_samples', lambda: (photograph, train, test))
        return main(['quickstart', '--output', str(tmp_path)]), *capsys.readouterr()

    monkeypatch.setattr(command, 'EPOCHS', 1)
    return run


def test_the_whole_tour(quickstart, tmp_path):
    code, out, err = quickstart(640, held_out=360)
    assert code == 0 and '20/20' in err  # the progress bar's batches
    assert re.findall(r'^(\d/\d) ', out, re.MULTILINE) == ['1/5', '2/5', '3/5', '4/5', '5/5']
    assert len(re.findall(rf'^ +[\d.]+ %  ({"|".join(CIFAR10)})$', out, re.MULTILINE)) == 3

    # it learned
    images, before, after = re.search(r'on (\d+) held-out digits: ([\d.]+) % before .*, ([\d.]+) % after', out).groups()
    assert int(images) == 360 and float(before) < 25 and float(after) > 40

    # what it left holds what it said, and loads
    folder = check_folder(tmp_path / NAME)
    metrics = {result.metric_name: result.metric_value for result in folder.card.data.eval_results}
    assert metrics['Top-1 accuracy'] == pytest.approx(float(after), abs=0.06)
    assert folder.model.pretrained_cfg['label_names'] == [str(digit) for digit in range(10)]
    assert folder.model.pretrained_cfg['tag'] == 'digits'


def test_digits_are_split_without_overlap_and_keep_their_labels():
    from sklearn.datasets import load_digits

    photograph, train, held_out = command._load_samples()
    assert photograph.mode == 'RGB' and min(photograph.size) > 200
    assert (len(train), len(held_out)) == (1437, 360)
    assert {label for _, label in held_out} == set(range(10))
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted(zip((pixels * (255 / 16)).astype('uint8').tolist(), labels.tolist()))
    images = [(np.asarray(image)[..., 0].ravel().tolist(), label) for image, label in [*train, *held_out]]
    assert sorted(images) == expected


def test_a_place_that_cannot_be_replaced_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, '_fine_tune', lambda *args: pytest.fail('the work began'))
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / 'thesis.txt').touch()
    for output, told in ((tmp_path, 'thesis.txt'), ('/proc/new', 'cannot be written')):
        assert main(['quickstart', '--output', str(output)]) == 1
        assert told in capsys.readouterr().err


def test_outputs_that_differ_after_loading_are_an_error(quickstart, monkeypatch):
    create_model = timm.create_model

    def create_another(name, *args, **kwargs):
        model = create_model(name, *args, **kwargs)
        if name.endswith(NAME):
            model.fc.bias.data[3] += 1e-4
        return model

    monkeypatch.setattr(timm, 'create_model', create_another)
    with pytest.raises(RuntimeError, match='not the one that was saved'):
        quickstart(32)


def test_missing_scikit_learn_names_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert main(['quickstart', '--output', str(tmp_path)]) == 1
    assert 'pip install "timm-regnet-reg[quickstart]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
