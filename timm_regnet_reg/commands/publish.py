"""Upload a packaged folder to the Hugging Face Hub.

Nothing is sent before the folder passes every check. All files go in one commit, which goes through as a whole or not
at all; afterwards the Hub's own hashes of them are compared. Nothing on the Hub is ever deleted.
The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN), and so is the server (HF_ENDPOINT).
"""

import argparse
import hashlib
from pathlib import Path
from typing import List, Optional

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError, reason
from ..pretrained import file_sha256
from ..weights.folder import FILES, Folder, check_folder

__all__ = ['publish']

_REMEDY = (
    'Check the connection, and that `hf auth whoami` names an account that may write there (`hf auth login`, or '
    'HF_TOKEN); then run the same command again.'
)


def publish(folder: Folder, repo_id: str, private: bool = False, create_pr: bool = False) -> CommitInfo:
    """Uploads a checked folder in one commit (or one pull request) and compares the Hub's hashes with the files.

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
        info = _find_repo(api, repo_id, private, create_pr)
        if info is None:
            api.create_repo(repo_id, private=private)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'{repo_id}: nothing was sent, for the Hub at {api.endpoint} refused or did not answer ({_short(error)}). '
            f'{_REMEDY}'
        ) from error
    try:
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, folder.path / name) for name in FILES],
            commit_message=f'Publish {folder.card.data.model_name}',
            create_pr=create_pr,
            # a commit of somebody else in between makes ours fail instead of mixing with it
            parent_commit=info.sha if info else None,
        )
    except Exception as error:
        raise UserError(
            f'{repo_id}: publishing failed ({_short(error)}). It is one commit, so all of it arrived or nothing: see '
            f'{url}/{"discussions" if create_pr else "commits/main"}.'
            f'{"" if info else " The repository was created, and stays."} {_REMEDY}'
        ) from error
    try:
        wrong = _differing(api, repo_id, commit.oid, folder.path)
    except Exception as error:
        raise UserError(
            f'{repo_id}: is published, {commit.pr_url or commit.commit_url}, but could not be compared '
            f'({_short(error)}). {_REMEDY} It sends only what differs, and compares.'
        ) from error
    if wrong:
        raise UserError(
            f'{repo_id}: is published, {commit.pr_url or commit.commit_url}, but on the Hub other hashes stand beside '
            f'{", ".join(wrong)} than those of the files in {folder.path}; run the same command again'
        )
    return commit


def _find_repo(api: HfApi, repo_id: str, private: bool, create_pr: bool) -> Optional[ModelInfo]:
    """The repository as it is, None if it is to be created; a UserError if the flags don't fit it."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise UserError(
                f'{repo_id}: no such repository on {api.endpoint} (or not visible to this token), so there is nothing '
                'to open a pull request on; leave --create-pr out to create it'
            )
        return None
    if private and not info.private:
        raise UserError(f'{repo_id}: exists and is public; make it private in its settings or leave --private out')
    return info


def _differing(api: HfApi, repo_id: str, revision: str, folder: Path) -> List[str]:
    """The files whose hash on the Hub isn't that of the file in the folder."""
    there = {entry.path: entry for entry in api.get_paths_info(repo_id, list(FILES), revision=revision)}

    def is_same(name: str) -> bool:
        if name not in there:
            return False
        if there[name].lfs:
            return there[name].lfs.sha256 == file_sha256(folder / name)
        data = (folder / name).read_bytes()
        return there[name].blob_id == hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()  # git's name of it

    return [name for name in FILES if not is_same(name)]


def _short(error: BaseException) -> str:
    """The error and its cause in one line; the client's own messages run over many."""
    text = ' '.join(reason(error).split())
    cause = error.__cause__
    return f'{text} {_short(cause)}' if isinstance(error, RuntimeError) and cause is not None else text


def _target(repo_id: str, private: bool, create_pr: bool) -> str:
    """Where the files would go, in words; the Hub is asked, but for nothing but what is there."""
    api = HfApi()
    try:
        info = _find_repo(api, repo_id, private, create_pr)
    except UserError:
        raise
    except Exception as error:
        state = f'{api.endpoint} could not be asked whether it exists ({_short(error)})'
    else:
        kind = 'private' if (info.private if info else private) else 'public'
        state = f'exists, {kind}, at commit {info.sha}' if info else f'would be created, {kind}'
    return f'{repo_id}, {"a new pull request" if create_pr else "revision main"}: {state}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='FOLDER', help='a folder that `package` wrote')
    parser.add_argument('--repo-id', required=True, metavar='OWNER/NAME', help='the repository; created if need be')
    parser.add_argument('--private', action='store_true', help='create it as a private repository')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument(
        '--dry-run', action='store_true', help='check, and show what would be sent, and where to; send nothing'
    )


def main(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise UserError(f'--repo-id {args.repo_id}: {error}') from error
    if args.repo_id.count('/') != 1:
        raise UserError(f'--repo-id {args.repo_id}: has no owner; expected OWNER/NAME, such as you/{args.repo_id}')
    folder = check_folder(args.folder)
    if args.dry_run:
        print(_target(args.repo_id, args.private, args.create_pr))
        for name in FILES:
            print(f'{name:20} {(folder.path / name).stat().st_size:>12,} bytes  {file_sha256(folder.path / name)}')
        print(f'\n{folder.card}')
        return
    commit = publish(folder, args.repo_id, args.private, args.create_pr)
    print(f'{args.repo_id}: {commit.pr_url or commit.commit_url}, the hashes on the Hub are those of the files')
