"""`publish`, and loading what was published, with the real huggingface_hub client against a local Hub."""

import hashlib
import shutil

import pytest
import torch

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.weights.folder import FILES

OTHER = {'README.md': b'---\nlicense: mit\n---\n', 'model.safetensors': b'older weights', 'notes.txt': b'mine'}


@pytest.fixture
def publish(packaged, capsys):
    """Runs the command. Returns exit code, stdout and stderr."""

    def run(*flags, folder=packaged, repo_id='owner/tiny'):
        code = main(['publish', str(folder), '--repo-id', repo_id, *flags])
        return (code, *capsys.readouterr())

    return run


def sent(folder, repo_id='owner/tiny'):
    """A folder's files as they are sent: the card says where it is then, and the config has the card's hash."""
    files = {name: (folder / name).read_bytes() for name in FILES}
    card = files['README.md'].replace(f'local-dir:{folder.name}'.encode(), f'hf-hub:{repo_id}'.encode())
    digests = (hashlib.sha256(text).hexdigest().encode() for text in (files['README.md'], card))
    return {**files, 'README.md': card, 'config.json': files['config.json'].replace(*digests)}


def test_published_model_loads_from_the_hub_as_its_card_says(trained, packaged, hub, publish):
    assert publish()[0] == 0
    card = hub.files('owner/tiny')['README.md'].decode()
    exec(card.split('```python')[1].split('```')[0], shown := {})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(shown['model'].eval()(images), trained.model(images))
    assert shown['model'].pretrained_cfg['hf_hub_id'] == 'owner/tiny'


def test_all_files_arrive_in_one_commit_beside_what_was_there(packaged, hub, publish):
    head = hub.add_repo('owner/tiny', OTHER)
    repo = hub.repos['owner/tiny']
    for _ in range(2):  # the second time there is nothing to send, and the hashes are compared all the same
        hub.requests.clear()
        code, out, _ = publish()
        assert code == 0 and repo.refs['main'] in out
        assert list(repo.commits) == [head, repo.refs['main']]
        assert hub.files('owner/tiny') == {**OTHER, **sent(packaged)}
        assert any('/tree/' in request for request in hub.requests)


def test_new_repository_is_private_on_request(hub, publish):
    assert publish('--private')[0] == 0
    assert hub.repos['owner/tiny'].private
    assert publish(repo_id='owner/public')[0] == 0
    assert not hub.repos['owner/public'].private
    before = hub.snapshot()
    code, _, err = publish('--private', repo_id='owner/public')
    assert code == 1 and 'exists and is public' in err and hub.snapshot() == before


def test_create_pr_leaves_main_alone(packaged, hub, publish):
    hub.add_repo('someone/else', OTHER)
    code, out, _ = publish('--create-pr', repo_id='someone/else')
    assert code == 0 and f'{hub.endpoint}/someone/else/discussions/1' in out
    assert hub.files('someone/else') == OTHER
    assert hub.files('someone/else', 'refs/pr/1') == {**OTHER, **sent(packaged, 'someone/else')}
    code, _, err = publish('--create-pr', repo_id='owner/absent')
    assert code == 1 and 'Repository Not Found' in err and 'owner/absent' not in hub.repos


@pytest.mark.parametrize('flags, place', [([], 'revision main'), (['--create-pr'], 'a new pull request')])
def test_dry_run_shows_what_would_go_where_and_asks_nobody(packaged, hub, publish, flags, place):
    code, out, _ = publish('--dry-run', *flags)
    assert code == 0 and f'{hub.endpoint}/owner/tiny, {place}\n' in out and hub.requests == []
    for name, content in sent(packaged).items():
        assert f'{len(content):,} bytes  {hashlib.sha256(content).hexdigest()}' in out and name in out
    assert sent(packaged)['README.md'].decode() in out


@pytest.mark.parametrize('repo_id, words', [('tiny', 'has no owner; expected OWNER/NAME'), ('a/b/c', "'a/b/c'")])
def test_repo_id_must_name_owner_and_repository(hub, publish, repo_id, words):
    code, _, err = publish(repo_id=repo_id)
    assert code == 1 and '--repo-id' in err and words in err and hub.requests == []


def test_spoiled_folder_never_reaches_the_hub(packaged, hub, publish, tmp_path):
    folder = shutil.copytree(packaged, tmp_path / 'folder')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    code, _, err = publish(folder=folder)
    assert code == 1 and 'added: pytorch_model.bin' in err and hub.requests == []


@pytest.mark.parametrize('token, owner, code', [('wrong', 'owner', 401), ('reader', 'owner', 403), ('owner', 'x', 403)])
@pytest.mark.parametrize('exists', [False, True])
def test_without_the_right_to_write_nothing_changes(hub, publish, monkeypatch, token, owner, code, exists):
    monkeypatch.setenv('HF_TOKEN', f'hf_{token}')
    if exists:
        hub.add_repo(f'{owner}/tiny', OTHER)
    before = hub.snapshot()
    exit_code, _, err = publish(repo_id=f'{owner}/tiny')
    assert exit_code == 1 and f'{code}' in err and 'hf auth login' in err and hub.snapshot() == before, err


@pytest.mark.parametrize(
    'kind, step, flags, words',
    [
        ('500', 'create', [], 'nothing was sent'),
        ('drop', 'preupload', [], 'all of it arrived or nothing'),
        ('500', 'commit', ['--create-pr'], 'all of it arrived or nothing'),
        ('drop', 'tree', [], 'could not be compared'),
        ('corrupt', 'tree', [], 'but on the Hub other hashes'),
        ('drop', 'answer', [], 'all of it arrived or nothing'),
    ],
)
def test_a_fault_leaves_all_or_nothing_and_says_what_to_do(packaged, hub, publish, kind, step, flags, words):
    head = hub.add_repo('owner/tiny', OTHER)
    hub.faults[step] = kind
    code, _, err = publish(*flags)
    assert code == 1 and words in err and 'run the same command again' in err
    assert ('Check the connection' in err) == (kind != 'corrupt')
    arrived = step in ('tree', 'answer')
    assert hub.files('owner/tiny') == ({**OTHER, **sent(packaged)} if arrived else OTHER)
    hub.faults.clear()
    assert publish(*flags)[0] == 0, 'the remedy works'
    assert hub.files('owner/tiny', 'refs/pr/1' if flags else 'main') == {**OTHER, **sent(packaged)}
    assert len(hub.repos['owner/tiny'].commits) == 2 and head in hub.repos['owner/tiny'].commits
