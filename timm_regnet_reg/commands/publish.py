"""Upload a packaged folder to the Hugging Face Hub.

Nothing is sent before the folder passes every check. All files go in one commit, which goes through as a whole or not
at all; afterwards the Hub's own hashes of them are compared. The card that is sent says how to load the network from
there, the folder's own how to load it from the folder. Nothing on the Hub is ever deleted.
The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN), and so is the server (HF_ENDPOINT).
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError, reason
from ..weights.folder import CARD, CONFIG, FILES, check_folder, file_sha256


def _set_source(folder: Path, old: str, new: str) -> None:
    """Let a folder's card load the network from another place."""
    card, config = folder / CARD, folder / CONFIG
    written = file_sha256(card)  # in the config, if the card wasn't edited by hand
    card.write_text(card.read_text(encoding='utf-8').replace(f"'{old}'", f"'{new}'"), encoding='utf-8')
    config.write_text(config.read_text(encoding='utf-8').replace(written, file_sha256(card)), encoding='utf-8')


def _publish(folder: Path, title: str, repo_id: str, private: bool, create_pr: bool) -> str:
    """Uploads a folder and compares hashes; returns the URL, or a UserError says how the Hub was left."""
    api = HfApi()
    state = f'nothing was sent to {api.endpoint}'
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise UserError('exists and is public; make it private in its settings or leave --private out')
        place = f'{api.endpoint}/{repo_id}/{"discussions" if create_pr else "commits/main"}'
        state = f'publishing failed. It is one commit, so all of it arrived or nothing: see {place}'
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=title, create_pr=create_pr)
        url = str(commit.pr_url or commit.commit_url)
        state = f'is published, {url}, but could not be compared'
        found = api.verify_repo_checksums(repo_id, revision=commit.oid, local_dir=folder)
    except Exception as error:
        told = ' '.join(f'{reason(error)} {error.__cause__ or ""}'.split())  # the client's messages run over many lines
        raise UserError(
            f'{repo_id}: {state} ({told}). Check the connection, and that `hf auth whoami` names an account that may '
            'write there (`hf auth login`, or HF_TOKEN); then run the same command again'
        ) from error
    if wrong := [mismatch['path'] for mismatch in found.mismatches] + found.extra_paths:
        told = f'but on the Hub other hashes stand beside {", ".join(wrong)} than those of the files'
        raise UserError(f'{repo_id}: is published, {url}, {told}; run the same command again')
    return url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='FOLDER', help='a folder that `package` wrote')
    parser.add_argument('--repo-id', required=True, metavar='OWNER/NAME', help='the repository; created if need be')
    parser.add_argument('--private', action='store_true', help='create it as a private repository')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--dry-run', action='store_true', help='check, and show what would be sent, and where to')


def main(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.repo_id)
        if '/' not in args.repo_id:
            raise ValueError(f'it has no owner; expected OWNER/NAME, such as you/{args.repo_id}')
    except ValueError as error:
        raise UserError(f'--repo-id {args.repo_id}: {error}') from error
    name = check_folder(args.folder).card.data.model_name
    with TemporaryDirectory() as place:
        folder = Path(place)
        try:
            for file in FILES:
                shutil.copyfile(Path(args.folder, file), folder / file)
            _set_source(folder, f'local-dir:{name}', f'hf-hub:{args.repo_id}')
        except OSError as error:
            raise UserError(f'{args.folder}: cannot be copied to {place} ({error}); set TMPDIR to another') from error
        if args.dry_run:
            print(f'{HfApi().endpoint}/{args.repo_id}, {"a new pull request" if args.create_pr else "revision main"}')
            for file in FILES:
                print(f'{file:20} {(folder / file).stat().st_size:>12,} bytes  {file_sha256(folder / file)}')
            print(f'\n{(folder / CARD).read_text(encoding="utf-8")}')
        else:
            url = _publish(folder, f'Publish {name}', args.repo_id, args.private, args.create_pr)
            print(f'{args.repo_id}: {url}, the hashes on the Hub are those of the files')
