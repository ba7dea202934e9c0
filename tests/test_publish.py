"""`publish`, and loading what was published, with the real huggingface_hub client against a local Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.weights.folder import FILES

ROOT = Path(__file__).parents[1]
OTHER = {'README.md': b'---\nlicense: mit\n---\n', 'model.safetensors': b'older weights', 'notes.txt': b'mine'}


@pytest.fixture
def publish(packaged, capsys):
    """Runs the command. Returns exit code, stdout and stderr."""

    def run(*flags, folder=packaged, repo_id='owner/tiny'):
        code = main(['publish', str(folder), '--repo-id', repo_id, *flags])
        return (code, *capsys.readouterr())

    return run


def sent(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def python(code, env, *args):
    """Runs code in a fresh process, as a user would; returns what it prints last, read as JSON."""
    run = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


LOAD = """
import json, sys, timm, timm_regnet_reg, safetensors.torch
images = safetensors.torch.load_file(sys.argv[1])['images']
model = timm.create_model('hf-hub:owner/tiny', pretrained=True).eval()
try:
    error = repr(timm.create_model('hf-hub:owner/absent', pretrained=True))
except Exception as e:
    error = repr(e)
print(json.dumps([model(images).tolist(), error]))
"""
PUBLISH_AND_LOAD = (
    """
import sys
from timm_regnet_reg.__main__ import main
assert main(['publish', sys.argv[2], '--repo-id', 'owner/tiny']) == 0
"""
    + LOAD
)


def test_published_model_loads_from_the_hub_then_offline_from_the_cache(trained, packaged, hub, tmp_path):
    """In fresh processes that know of the Hub by their environment alone, as on a user's machine."""
    images = torch.randn(2, 3, 32, 32)
    safetensors.torch.save_file({'images': images}, tmp_path / 'images')
    expected = trained.model(images).tolist()

    outputs, error = python(
        PUBLISH_AND_LOAD, hub.env(tmp_path / 'home', token='hf_owner'), tmp_path / 'images', packaged
    )
    assert hub.files('owner/tiny').items() >= sent(packaged).items()
    assert outputs == expected and 'RepositoryNotFoundError' in error

    hub.requests.clear()
    outputs, error = python(LOAD, hub.env(tmp_path / 'home', HF_HUB_OFFLINE='1'), tmp_path / 'images')
    assert outputs == expected and 'LocalEntryNotFoundError' in error
    assert hub.requests == []


def test_publishing_without_network_says_so(hub, publish):
    hub.close()
    code, _, err = publish()
    assert code == 1 and 'nothing was sent' in err and 'Check the connection' in err


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
    assert hub.files('someone/else', 'refs/pr/1') == {**OTHER, **sent(packaged)}
    code, _, err = publish('--create-pr', repo_id='owner/absent')
    assert code == 1 and 'Repository Not Found' in err and 'owner/absent' not in hub.repos


@pytest.mark.parametrize('flags, place', [([], 'revision main'), (['--create-pr'], 'a new pull request')])
def test_dry_run_shows_what_would_go_where_and_asks_nobody(packaged, hub, publish, flags, place):
    code, out, _ = publish('--dry-run', *flags)
    assert code == 0 and f'{hub.endpoint}/owner/tiny, {place}\n' in out and hub.requests == []
    for name in FILES:
        assert f'{(packaged / name).stat().st_size:,} bytes' in out and name in out
    assert (packaged / 'README.md').read_text().strip() in out


@pytest.mark.parametrize('repo_id, words', [('tiny', 'has no owner; expected OWNER/NAME'), ('a/b/c', "'a/b/c'")])
def test_repo_id_must_name_owner_and_repository(hub, publish, repo_id, words):
    code, _, err = publish(repo_id=repo_id)
    assert code == 1 and '--repo-id' in err and words in err and hub.requests == []


def test_spoiled_folder_never_reaches_the_hub(packaged, hub, publish, tmp_path):
    folder = shutil.copytree(packaged, tmp_path / 'folder')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    code, _, err = publish(folder=folder)
    assert code == 1 and 'added: pytorch_model.bin' in err and hub.requests == []


@pytest.mark.parametrize(
    'token, repo_id, words',
    [
        ('hf_wrong', 'owner/tiny', '401'),
        ('hf_reader', 'owner/tiny', '403'),
        ('hf_owner', 'someone/tiny', '403'),
    ],
)
@pytest.mark.parametrize('exists', [False, True])
def test_without_the_right_to_write_nothing_changes(hub, publish, monkeypatch, token, repo_id, words, exists):
    monkeypatch.setenv('HF_TOKEN', token)
    if exists:
        hub.add_repo(repo_id, OTHER)
    before = hub.snapshot()
    code, _, err = publish(repo_id=repo_id)
    assert code == 1 and words in err and hub.snapshot() == before, err
    assert 'hf auth login' in err


@pytest.mark.parametrize(
    'kind, step, flags',
    [
        ('500', 'create', []),
        ('drop', 'preupload', ['--create-pr']),
        ('500', 'batch', []),
        ('drop', 'upload', []),
        ('500', 'commit', ['--create-pr']),
        ('drop', 'commit', []),
    ],
)
def test_a_fault_before_the_commit_changes_nothing_and_says_what_to_do(packaged, hub, publish, kind, step, flags):
    hub.add_repo('owner/tiny', OTHER)
    before = hub.snapshot()
    hub.fault(kind, step)
    code, _, err = publish(*flags)
    assert code == 1 and 'run the same command again' in err and hub.snapshot() == before
    assert ('nothing was sent' if step == 'create' else 'all of it arrived or nothing') in err
    hub.faults.clear()
    assert publish(*flags)[0] == 0, 'the remedy works'
    assert hub.files('owner/tiny', 'refs/pr/1' if flags else 'main').items() >= sent(packaged).items()


@pytest.mark.parametrize('kind, words', [('drop', 'could not be compared'), ('corrupt', 'other hashes')])
def test_what_was_committed_stays_even_if_it_cannot_be_compared(packaged, hub, publish, kind, words):
    hub.add_repo('owner/tiny', OTHER)
    hub.fault(kind, 'tree')
    code, _, err = publish()
    assert code == 1 and words in err and 'is published' in err and 'run the same command again' in err
    assert hub.files('owner/tiny') == {**OTHER, **sent(packaged)}
    hub.faults.clear()
    assert publish()[0] == 0, 'the remedy works'


def test_lost_answer_to_a_commit_is_told_and_running_again_settles_it(packaged, hub, publish):
    hub.add_repo('owner/tiny', OTHER)
    hub.fault('drop', 'answer', times=1)
    code, _, err = publish()
    assert code == 1 and f'arrived or nothing: see {hub.endpoint}/owner/tiny/commits/main (' in err
    head = hub.repos['owner/tiny'].refs['main']
    assert publish()[0] == 0 and hub.repos['owner/tiny'].refs['main'] == head
    assert hub.files('owner/tiny') == {**OTHER, **sent(packaged)}
