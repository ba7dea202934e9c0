"""`classify`: the classes that the network really gives, of whatever can be an image, and an error for all the rest."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, MODEL
from PIL import Image
from timm.data import ImageDataset

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.weights.inference import class_labels, load_model, predict
from timm_regnet_reg.weights.scoring import ImageFolder, read_image


@pytest.fixture
def classify(packaged, capsys):
    """Runs the command. Returns exit code, stdout and stderr."""

    def run(*args, model=f'local-dir:{packaged}'):
        code = main(['classify', *map(str, args), *(['--model', model] if model else [])])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def photo(image_folder):
    return image_folder / 'validation' / 'bee' / '0.png'


def probabilities(model, path):
    """Of a 32x32 image, which needs neither resizing nor cropping."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        return model(((pixels - mean) / std)[None]).softmax(1)[0]


def test_prints_the_networks_own_probabilities_with_label_names(classify, photo, packaged):
    expected = probabilities(timm.create_model(f'local-dir:{packaged}', pretrained=True).eval(), photo)
    code, out, _ = classify(photo, '--json')
    predictions = json.loads(out)['images'][0]['predictions']
    assert code == 0
    assert [p['index'] for p in predictions] == expected.argsort(descending=True).tolist()
    assert [p['label'] for p in predictions] == [CLASSES[p['index']] for p in predictions]
    expected = expected.sort(descending=True)[0].tolist()
    assert [p['probability'] for p in predictions] == pytest.approx(expected, abs=1e-6)

    code, out, _ = classify(photo, '--topk', 50)  # there are no more classes than three
    lines = [f'{100 * p["probability"]:7.2f} %  {p["label"]}' for p in predictions]
    assert (code, out.splitlines()) == (0, [str(photo), *lines])


def test_several_images_and_folders_in_the_order_given(classify, photo, tmp_path):
    folder = tmp_path / 'folder'
    (folder / 'below').mkdir(parents=True)
    image = Image.open(photo)
    for name in ('b.PNG', 'a.jpg', 'below/c.webp', '.hidden.png'):
        image.save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    code, out, _ = classify(folder, photo, '--json', '--topk', 1)
    result = json.loads(out)
    assert code == 0
    assert result['model'].startswith('local-dir:')
    expected = [folder / 'a.jpg', folder / 'b.PNG', folder / 'below' / 'c.webp', photo]
    assert [image['image'] for image in result['images']] == list(map(str, expected))
    assert {len(image['predictions']) for image in result['images']} == {1}
    assert result['images'][1]['predictions'] == result['images'][3]['predictions']


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda path, data: path.write_bytes(data[:-1500]), 'cannot be read as an image'),
        (lambda path, data: (path / 'below').mkdir(parents=True), 'holds no images'),
        (lambda path, data: Image.new('I', (32, 32), 300).save(path, 'tiff'), 'it has 32 bits a pixel'),
        (lambda path, data: Image.new('F', (32, 32), 300).save(path, 'tiff'), 'it has 32 bits a pixel'),
        (lambda path, data: None, 'no such file or folder'),
    ],
)
def test_bad_image_among_good_ones_is_named_before_any_output(make, message, classify, photo, tmp_path):
    bad = tmp_path / 'bad.png'
    make(bad, photo.read_bytes())
    code, out, err = classify(photo, bad, photo)
    assert (code, out) == (1, '')
    assert f'regnet-reg: error: {bad}: ' in err and message in err


def test_undecodable_file_name_is_in_the_json(classify, photo, tmp_path):
    name = os.fsencode(tmp_path) + b'/\xff\xe9.png'
    shutil.copy(photo, name)
    code, out, _ = classify(os.fsdecode(name), '--json')
    assert code == 0 and out.isascii()
    assert os.fsencode(json.loads(out)['images'][0]['image']) == name


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGBA', 'CMYK', 'I;16'])
def test_every_mode_of_image(mode, tmp_path):
    path = tmp_path / ('image.tiff' if mode in ('CMYK', 'PA') else 'image.png')
    white = Image.new('L', (50, 40), 255)
    (Image.new(mode, (50, 40), 65535) if mode == 'I;16' else white.convert(mode)).save(path)
    image = read_image(str(path))
    assert image.mode == 'RGB' and image.getextrema() == ((255, 255),) * 3


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path):
    deep = np.arange(2**16, dtype=np.uint16).reshape(2**8, 2**8)
    Image.fromarray(deep).save(tmp_path / 'deep.png')
    assert (np.asarray(read_image(tmp_path / 'deep.png')) == np.round(deep / 257)[..., None]).all()


def test_photo_is_turned_as_the_camera_was_and_data_is_as_timms(photo, tmp_path):
    upright = Image.open(photo)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    (tmp_path / 'class').mkdir()
    upright.rotate(90).save(tmp_path / 'class' / 'turned.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'class' / 'turned.png'), upright)
    for data in (ImageFolder(tmp_path, {'input_size': (3, 32, 32)}, num_classes=1), ImageDataset(str(tmp_path))):
        assert np.array_equal(data[0][0], upright.rotate(90))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(num_classes=2, model_args={'num_classes': 3}), '3 classes apart, but its config has num_classes 2'),
        (dict(model_args={'num_classes': 5}), 'tells 5 classes apart'),
        (dict(label_names=['a', 'b']), "label_names ['a', 'b']"),
        (dict(label_names={'a': 0, 'b': 1, 'c': 2}), "label_names {'a': 0"),
        (dict(label_names=7), 'label_names 7'),
        (dict(label_descriptions=['a']), 'label_descriptions of others'),
        (dict(pretrained_cfg={'interpolation': 'nope'}), 'cannot classify'),
        (dict(pretrained_cfg={'std': [0, 0, 0]}), 'error: local-dir:'),
    ],
)
def test_network_that_would_answer_at_random_is_refused(change, message, packaged, photo, classify, tmp_path):
    folder = shutil.copytree(packaged, tmp_path / 'changed')
    config = json.loads((folder / 'config.json').read_text())
    cfg = {**config['pretrained_cfg'], **change.get('pretrained_cfg', {})}
    (folder / 'config.json').write_text(json.dumps({**config, **change, 'pretrained_cfg': cfg}))
    code, out, err = classify(photo, '--json', model=f'local-dir:{folder}')
    assert (code, out) == (1, '') and message in err


@pytest.mark.parametrize(
    'args, told',
    [
        ([''], "error: '': no such file or folder"),
        (['{photo}', 'http://no/such.png'], 'error: http://no/such.png: no such file or folder'),
        (['{photo}', '--topk', '0'], "--topk: '0' was given, expected a whole number"),
        (['{photo}', '--device', 'nope'], 'error: --device nope: expected cpu'),
        (['{photo}', '--device', 'meta'], 'error: --device meta: expected cpu'),
        (['{photo}', '--model', 'regnet_reg_resnet20_convltsm'], 'regnet_reg_resnet20_convltsm: could not be loaded'),
        (['{photo}', '--model', 'timm/resnet18.a1_in1k'], 'hf-hub:OWNER/NAME'),
        (['{photo}', '--model', 'regnet_reg_resnext50_2x40d_convlstm'], 'No pretrained weights exist'),
        (['{photo}', '--model', '{photo}'], 'png: is a file; give local-dir:FOLDER'),
        (['{photo}', '--model', 'local-dir:{photo}'], 'png: is a file; give local-dir:FOLDER'),
    ],
)
def test_what_cannot_be_had_is_told(args, told, photo, capsys):
    try:
        code = main(['classify', *(text.format(photo=photo) for text in args)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2) and not out and told in err


def test_model_without_a_classifier_is_refused(packaged, photo, monkeypatch):
    headless = timm.create_model(MODEL, num_classes=0)
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: headless)
    with pytest.raises(UserError, match='has no classifier'):
        load_model(MODEL)


def test_outputs_that_are_not_finite_for_an_image_are_no_answer(photo):
    model = timm.create_model(MODEL).eval()
    torch.nn.init.constant_(model.fc.bias, torch.nan)
    with pytest.raises(UserError, match='not finite'):
        next(predict(model, [Image.open(photo)]))


@pytest.mark.parametrize(
    'model, num_classes, cfg, index, label',
    [
        ('resnet18', 1000, {}, 281, 'tabby, tabby cat'),
        (MODEL, 3, {}, 1, '1'),
        (MODEL, 3, {'label_names': ['a', 'b', 'c']}, 1, 'b'),
        (MODEL, 3, {'label_names': ['a', 'b', 'c'], 'label_descriptions': {'b': 'a bee'}}, 1, 'a bee'),
    ],
)
def test_labels_come_from_the_config_or_imagenet_or_are_numbers(model, num_classes, cfg, index, label):
    with torch.device('meta'):
        model = timm.create_model(model, num_classes=num_classes)
    model.pretrained_cfg.update({'label_names': None, **cfg})
    assert class_labels(model)[index] == label


def test_default_model_ships_with_the_package_and_names_cifar10s_classes(classify, photo):
    code, out, _ = classify(photo, '--topk', 10, '--json', model=None)
    assert code == 0
    classes = {'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'}
    assert {p['label'] for p in json.loads(out)['images'][0]['predictions']} == classes
