"""Upload a packaged folder to the Hugging Face Hub.

All files go in one commit and are read back to compare. Nothing is sent before the folder passes every check. If
anything fails after that, the Hub is put back as it was.
The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN), and so is the server (HF_ENDPOINT).
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Dict, Optional

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError
from ..pretrained import file_sha256
from ..support.folder import FILES, Folder, check_folder

__all__ = ['publish']

_REMEDY = (
    'Check the connection, and that `hf auth whoami` names an account that may write there (`hf auth login`, or '
    'HF_TOKEN); then run the same command again.'
)


def publish(folder: Folder, repo_id: str, private: bool = False, create_pr: bool = False) -> CommitInfo:
    """Uploads a checked folder in one commit (or one pull request) and compares what the Hub then serves.

    Args:
        folder: What `check_folder` returned.
        repo_id: `OWNER/NAME`; created if it does not exist.
        private: Create it as a private repository.
        create_pr: Open a pull request on an existing repository instead of changing it.

    Raises:
        UserError: Says what failed, how the Hub was left, and what to do.
    """
    api = HfApi()
    url = f'{api.endpoint}/{repo_id}'
    try:
        head, created = _open_repo(api, repo_id, private, create_pr)
        restore = [] if created or create_pr else _remember(api, repo_id, head)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'{repo_id}: nothing was sent, for the Hub at {api.endpoint} refused or did not answer ({_short(error)}). '
            f'{_REMEDY}'
        ) from error

    commit = None
    try:
        hashes = {name: file_sha256(folder.path / name) for name in FILES}
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, folder.path / name) for name in FILES],
            commit_message=f'Publish {folder.card.data.model_name}',
            create_pr=create_pr,
            parent_commit=head,  # a commit of somebody else in between makes ours fail instead of mixing with it
        )
        _compare(api, repo_id, commit.oid, hashes)
    except BaseException as error:  # an interrupted upload leaves no traces either
        try:
            outcome = _undo(api, repo_id, head, created, restore, commit)
            if create_pr and commit is None:
                outcome += f' Should {url}/discussions show a pull request all the same, its answer was lost: close it.'
        except Exception as undo_error:
            outcome = (
                f'The Hub could not be put back as it was ({_short(undo_error)}). Look at {url}/commits/main and '
                f'{url}/discussions: before, '
                + (f'there was no such repository; delete it at {url}/settings.' if created else f'it was at {head}.')
            )
        if not isinstance(error, Exception):
            print(outcome, file=sys.stderr)
            raise
        raise UserError(
            f'{repo_id}: {"publishing" if commit is None else "reading back"} failed ({_short(error)}). {outcome} '
            f'{_REMEDY}'
        ) from error
    return commit


def _open_repo(api: HfApi, repo_id: str, private: bool, create_pr: bool):
    """The commit at the head of the repository, which is created if need be, and whether it was."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise UserError(
                f'{repo_id}: no such repository on {api.endpoint} (or not visible to this token), so there is nothing '
                'to open a pull request on; leave --create-pr out to create it'
            )
    else:
        if private and not info.private:
            raise UserError(f'{repo_id}: exists and is public; make it private in its settings or leave --private out')
        return info.sha, False
    api.create_repo(repo_id, private=private)
    try:
        return api.model_info(repo_id).sha, True
    except BaseException:
        api.delete_repo(repo_id)
        raise


def _compare(api: HfApi, repo_id: str, revision: str, hashes: Dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as cache:  # not the user's cache, which could answer in the Hub's place
        for name, sha256 in hashes.items():
            found = file_sha256(api.hf_hub_download(repo_id, name, revision=revision, cache_dir=cache))
            if found != sha256:
                raise UserError(f'{name} came back with SHA-256 {found}, {sha256} was sent')


def _remember(api: HfApi, repo_id: str, head: str) -> list:
    """The operations that would bring back the files which are about to be replaced."""
    before = {entry.path: entry for entry in api.get_paths_info(repo_id, list(FILES), revision=head)}
    restore = []
    for name in FILES:
        if name not in before:
            restore.append(CommitOperationDelete(name))
        elif before[name].lfs:
            restore.append(CommitOperationCopy(name, name, src_revision=head))
        else:  # a copy would fetch the content at the very time when something is amiss
            with tempfile.TemporaryDirectory() as cache:
                data = Path(api.hf_hub_download(repo_id, name, revision=head, cache_dir=cache)).read_bytes()
            if hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest() != before[name].blob_id:
                raise OSError(f'{name} arrived damaged')
            restore.append(CommitOperationAdd(name, data))
    return restore


def _undo(api: HfApi, repo_id: str, head: str, created: bool, restore: list, commit: Optional[CommitInfo]) -> str:
    """Puts the Hub back as it was before this run, and says so."""
    if commit is not None and commit.pr_num is not None:
        api.change_discussion_status(repo_id, commit.pr_num, 'closed')
        return f'Pull request {commit.pr_num} is closed again: the repository is as it was.'
    now = api.model_info(repo_id).sha
    if now != head and (commit is None or now != commit.oid):
        return (
            f'Meanwhile the repository moved from commit {head} to {now}: somebody else published, or the answer to '
            'this commit was lost. Running the command again tells: it sends only what differs, and compares.'
        )
    if created:
        api.delete_repo(repo_id)
        return 'The repository that this run had created is deleted again: the Hub is as it was.'
    if now == head:
        return f'The repository is as it was, at commit {head}.'
    api.create_commit(repo_id, restore, commit_message=f'Undo {commit.oid}', parent_commit=commit.oid)
    return f'A second commit restored the files of commit {head}: the repository is as it was.'


def _short(error: BaseException) -> str:
    """The error and its cause in one line; the client's own messages run over many."""
    text = ' '.join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    return f'{text} {_short(cause)}' if isinstance(error, RuntimeError) and cause is not None else text


def main(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise UserError(f'--repo-id {args.repo_id}: {error}') from error
    if args.repo_id.count('/') != 1:
        raise UserError(f'--repo-id {args.repo_id}: has no owner; expected OWNER/NAME, such as you/{args.repo_id}')
    folder = check_folder(args.folder)
    if args.dry_run:
        for name in FILES:
            print(f'{name:20} {(folder.path / name).stat().st_size:>12,} bytes  {file_sha256(folder.path / name)}')
        print(f'\n{folder.card}')
        return
    commit = publish(folder, args.repo_id, args.private, args.create_pr)
    print(f'{args.repo_id}: {commit.pr_url or commit.commit_url}, read back and compared')
