"""A small local Hub for tests: as much of its HTTP API as the real huggingface_hub client needs.

Repositories are private or public, and hold commits, branches and pull requests, all files without LFS. `fault()` makes
one step fail. With the fixture `hub`, the client in the test's own process talks to the server, with the owner's token;
a subprocess gets `env=hub.env(cache=folder)`. What the server answers follows the client's own source and the Hub's
documented API.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Dict, Optional
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKENS = {'hf_owner': ['owner'], 'hf_reader': []}  # whose repositories they may write


def git_name(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class Repo:
    def __init__(self, private: bool, files: Dict[str, bytes]):
        self.private = private
        self.commits: Dict[str, Dict[str, bytes]] = {}
        self.refs: Dict[str, str] = {}
        self.commit('main', files)

    def commit(self, ref: str, files: Dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> Optional[str]:
        revision = unquote(revision)
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """The server, started on a free port of the loopback interface."""

    def __init__(self):
        self.repos: Dict[str, Repo] = {}
        self.requests = []  # 'METHOD path' of each request
        self.faults: Dict[str, str] = {}
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.endpoint = f'http://127.0.0.1:{self.http.server_address[1]}'
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add_repo(self, repo_id: str, files: Dict[str, bytes]) -> str:
        """Puts a public repository there as if it had been pushed long ago. Returns its commit."""
        self.repos[repo_id] = Repo(False, files)
        return self.repos[repo_id].refs['main']

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def snapshot(self) -> dict:
        """All that a visitor sees: each repository's branches and pull requests, and their files."""
        return {name: {ref: self.files(name, ref) for ref in repo.refs} for name, repo in self.repos.items()}

    def fault(self, kind: str, step: str) -> None:
        """Makes a step fail, until it is taken out of `faults`.

        Args:
            kind: 'drop' closes the connection half way through a body, '500' answers so, 'corrupt' tells other hashes.
            step: One of those in _ROUTES, or 'answer', a commit that is done but whose answer never arrives.
        """
        assert step == 'answer' or step in [step for _, _, step in _ROUTES]
        self.faults[step] = kind

    def env(self, cache, token: str = '', **extra: str) -> dict:
        """The environment of a subprocess whose huggingface_hub talks to this server, with its own cache folder."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
        env.update(HF_ENDPOINT=self.endpoint, HF_HOME=str(cache), HF_HUB_CACHE=os.path.join(cache, 'hub'), **extra)
        env.update(HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', HF_TOKEN=token)
        return env


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    # Answers

    def answer(self, status: int, body=b'', headers: Optional[dict] = None, half: bool = False) -> None:
        """`half`: only half of the body goes out, under the headers of the whole."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {'Content-Type': 'application/json', **(headers or {})}
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[: len(body) // 2] if half else body)

    def error(self, status: int, code: str = '', message: str = '') -> None:
        self.answer(status, {'error': message}, {'X-Error-Code': code, 'X-Error-Message': message})

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # Requests

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f'{self.command} {self.path}')
        length = int(self.headers.get('Content-Length', 0))
        for method, pattern, step in _ROUTES:
            match = self.command == method and re.fullmatch(pattern, url.path)
            if not match:
                continue
            self.fault = self.hub.faults.get(step)
            if self.fault == 'drop' and step != 'read':
                self.rfile.read(length // 2)
                return self.drop()
            self.data = self.rfile.read(length)
            if self.fault == '500':
                return self.error(500, message='Internal Server Error')
            return getattr(self, step)(**match.groupdict())
        self.rfile.read(length)
        self.error(404, message=f'no such endpoint: {self.command} {url.path}')

    do_GET = do_HEAD = do_POST = handle_request

    def writable(self) -> Optional[list]:
        return TOKENS.get(self.headers.get('Authorization', '').removeprefix('Bearer '))

    def find(self, repo_id: str, revision: str, write: bool = False) -> tuple:
        """The repository and the commit, or a pair of None after an error was answered."""
        repo, writable = self.hub.repos.get(repo_id), self.writable()
        oid = repo and repo.resolve(revision)
        if repo is None:
            self.error(401 if writable is None else 404, 'RepoNotFound', 'Repository not found')
        elif write and writable is None:
            self.error(401, '', 'Invalid username or password.')
        elif write and repo_id.split('/')[0] not in writable and 'create_pr' not in self.query:
            self.error(403, '', 'Forbidden: you must use a token with write access to this repository')
        elif oid is None:
            self.error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        else:
            return repo, oid
        return None, None

    def create(self) -> None:
        asked = json.loads(self.data)
        owner, repo_id = asked['organization'], f'{asked["organization"]}/{asked["name"]}'
        if self.writable() is None:
            return self.error(401, '', 'Invalid username or password.')
        if owner not in self.writable():
            return self.error(403, '', f"You don't have the rights to create a model under {owner}")
        url = {'url': f'{self.hub.endpoint}/{repo_id}'}
        if repo_id in self.hub.repos:
            return self.answer(409, {'error': 'You already created this model repo', **url})
        private = asked.get('visibility') == 'private' or bool(asked.get('private'))
        self.hub.repos[repo_id] = Repo(private, {'.gitattributes': b''})
        self.answer(200, url)

    def validate_yaml(self) -> None:
        self.answer(200, {'errors': [], 'warnings': []})

    def info(self, repo_id: str, revision: str = 'main') -> None:
        repo, oid = self.find(repo_id, revision)
        if oid:
            siblings = [{'rfilename': path} for path in repo.commits[oid]]
            self.answer(200, {'id': repo_id, 'sha': oid, 'private': repo.private, 'siblings': siblings, 'tags': []})

    def tree(self, repo_id: str, revision: str) -> None:
        repo, oid = self.find(repo_id, revision)
        if oid:
            wrong = b'!' if self.fault == 'corrupt' else b''
            files = repo.commits[oid].items()
            told = [{'path': path, 'size': len(data), 'oid': git_name(data + wrong)} for path, data in files]
            self.answer(200, [{'type': 'file', **file} for file in told])

    def preupload(self, repo_id: str, revision: str) -> None:
        repo, oid = self.find(repo_id, revision, write=True)
        if oid:
            files, answers = repo.commits[oid], []
            for path in (file['path'] for file in json.loads(self.data)['files']):
                known = git_name(files[path]) if path in files else None
                answers.append({'path': path, 'uploadMode': 'regular', 'shouldIgnore': False, 'oid': known})
            self.answer(200, {'files': answers})

    def commit(self, repo_id: str, revision: str) -> None:
        repo, oid = self.find(repo_id, revision, write=True)
        if oid is None:
            return
        files = dict(repo.commits[oid])
        _, *operations = [json.loads(line) for line in self.data.splitlines()]
        for value in (operation['value'] for operation in operations):
            files[value['path']] = base64.b64decode(value['content'])
        number = len(repo.refs)  # main is no pull request
        create_pr = 'create_pr' in self.query
        oid = repo.commit(f'refs/pr/{number}' if create_pr else unquote(revision), files)
        url = f'{self.hub.endpoint}/{repo_id}'
        answer = {'commitUrl': f'{url}/commit/{oid}', 'commitOid': oid}
        if create_pr:
            answer['pullRequestUrl'] = f'{url}/discussions/{number}'
        if 'answer' in self.hub.faults:
            return self.drop()
        self.answer(200, answer)

    def read(self, repo_id: str, revision: str, path: str) -> None:
        repo, oid = self.find(repo_id, revision)
        if oid is None:
            return
        path = unquote(path)
        data, headers = repo.commits[oid].get(path), {'X-Repo-Commit': oid}
        if data is None:
            return self.answer(404, b'', {**headers, 'X-Error-Code': 'EntryNotFound'})
        headers.update({'ETag': f'"{git_name(data)}"', 'Accept-Ranges': 'bytes'})
        self.answer(200, data, headers, half=self.fault == 'drop')
        if self.fault == 'drop':
            self.drop()

    ask = read


_ID, _REV = r'(?P<repo_id>[^/]+/[^/]+)', r'(?P<revision>[^/]+)'
_ROUTES = (
    ('POST', '/api/repos/create', 'create'),
    ('POST', '/api/validate-yaml', 'validate_yaml'),
    ('POST', f'/api/models/{_ID}/preupload/{_REV}', 'preupload'),
    ('POST', f'/api/models/{_ID}/commit/{_REV}', 'commit'),
    ('GET', f'/api/models/{_ID}/tree/{_REV}', 'tree'),
    ('GET', f'/api/models/{_ID}', 'info'),
    ('GET', f'/api/models/{_ID}/revision/{_REV}', 'info'),
    ('HEAD', f'/{_ID}/resolve/{_REV}/(?P<path>.+)', 'ask'),
    ('GET', f'/{_ID}/resolve/{_REV}/(?P<path>.+)', 'read'),
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh HubServer; this process's huggingface_hub talks to it as its owner, with an empty cache, unhurried."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    server = HubServer()
    template = server.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub_cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no_token'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    hasty = SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})  # no waits between the client's retries
    monkeypatch.setattr(_http, 'time', hasty)
    monkeypatch.setattr(file_download, 'time', hasty)
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
    yield server
    server.close()
