"""A small local Hub for tests: as much of its HTTP API as the real huggingface_hub client needs.

Repositories are private or public, and hold commits, branches and pull requests, all files without LFS. With the
fixture `hub`, the client in the test's own process talks to the server, with the owner's token. What the server answers
follows the client's own source and the Hub's documented API.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKENS = {'hf_owner': ['owner'], 'hf_reader': []}  # whose repositories they may write


def git_name(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class Repo:
    def __init__(self, private: bool, files: dict[str, bytes]):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.commit('main', files)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid


class HubServer:
    """The server, started on a free port of the loopback interface."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests = []  # 'METHOD path' of each request
        # by a step in _ROUTES, or 'answer', that of a commit that is done: 'drop' closes the connection amid a request,
        # '500' answers so, 'corrupt' tells other hashes
        self.faults: dict[str, str] = {}
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.endpoint = f'http://127.0.0.1:{self.http.server_address[1]}'
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def add_repo(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Puts a public repository there as if it had been pushed long ago. Returns its commit."""
        self.repos[repo_id] = Repo(False, files)
        return self.repos[repo_id].refs['main']

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        return self.repos[repo_id].commits[self.repos[repo_id].refs[revision]]

    def snapshot(self) -> dict:
        """All that a visitor sees: each repository's branches and pull requests, and their files."""
        return {name: {ref: self.files(name, ref) for ref in repo.refs} for name, repo in self.repos.items()}


class Refused(Exception):
    """An error for an answer: status, the Hub's code, words, and what else it says."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes, headers: dict) -> None:
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f'{self.command} {self.path}')
        routes = ((step, re.fullmatch(pattern, f'{self.command} {url.path}')) for pattern, step in _ROUTES)
        step, match = next(route for route in routes if route[1])
        self.fault, length = self.hub.faults.get(step), int(self.headers.get('Content-Length', 0))
        self.data = self.rfile.read(length // 2 if self.fault == 'drop' else length)
        try:
            if self.fault == '500':
                raise Refused(500, '', 'Internal Server Error')
            told = getattr(self, step)(**match.groupdict()) if self.fault != 'drop' else None
            if told is None or (step == 'commit' and 'answer' in self.hub.faults):
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            body, headers = (json.dumps(told).encode(), {}) if isinstance(told, (dict, list)) else told
            self.answer(200, body, {'Content-Type': 'application/json', **headers})
        except Refused as error:
            status, code, words, *more = error.args
            headers = {'X-Error-Code': code, 'X-Error-Message': words, 'Content-Type': 'application/json'}
            self.answer(status, json.dumps(dict(*more, error=words)).encode(), headers)

    do_GET = do_HEAD = do_POST = handle_request

    # What is asked for: its answer as JSON, or as bytes with headers

    def check_writable(self, owner: str) -> None:
        writable = TOKENS.get(self.headers.get('Authorization', '').removeprefix('Bearer '))
        if writable is None:
            raise Refused(401, '', 'Invalid username or password.')
        if owner not in writable and 'create_pr' not in self.query:
            raise Refused(403, '', 'Forbidden: you must use a token with write access to this repository')

    def find(self, repo_id: str, revision: str) -> tuple:
        if repo_id not in self.hub.repos:
            raise Refused(404, 'RepoNotFound', 'Repository not found')
        repo, revision = self.hub.repos[repo_id], unquote(revision)
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return repo, oid

    def create(self) -> dict:
        asked = json.loads(self.data)
        self.check_writable(asked['organization'])
        repo_id = f'{asked["organization"]}/{asked["name"]}'
        url = {'url': f'{self.hub.endpoint}/{repo_id}'}
        if repo_id in self.hub.repos:
            raise Refused(409, '', 'You already created this model repo', url)
        self.hub.repos[repo_id] = Repo(asked.get('visibility') == 'private' or bool(asked.get('private')), {})
        return url

    def validate_yaml(self) -> dict:
        return {'errors': [], 'warnings': []}

    def info(self, repo_id: str, revision: str = 'main') -> dict:
        repo, oid = self.find(repo_id, revision)
        siblings = [{'rfilename': path} for path in repo.commits[oid]]
        return {'id': repo_id, 'sha': oid, 'private': repo.private, 'siblings': siblings, 'tags': []}

    def tree(self, repo_id: str, revision: str) -> list:
        repo, oid = self.find(repo_id, revision)
        wrong = b'!' if self.fault == 'corrupt' else b''
        files = {path: (len(data), git_name(data + wrong)) for path, data in repo.commits[oid].items()}
        return [{'type': 'file', 'path': path, 'size': size, 'oid': oid} for path, (size, oid) in files.items()]

    def preupload(self, repo_id: str, revision: str) -> dict:
        repo, oid = self.find(repo_id, revision)
        self.check_writable(repo_id.split('/')[0])
        known = {path: git_name(data) for path, data in repo.commits[oid].items()}
        paths = [file['path'] for file in json.loads(self.data)['files']]
        told = {'uploadMode': 'regular', 'shouldIgnore': False}
        return {'files': [{'path': path, 'oid': known.get(path), **told} for path in paths]}

    def commit(self, repo_id: str, revision: str) -> dict:
        repo, oid = self.find(repo_id, revision)
        self.check_writable(repo_id.split('/')[0])
        _, *operations = [json.loads(line)['value'] for line in self.data.splitlines()]
        sent = {value['path']: base64.b64decode(value['content']) for value in operations}
        number = len(repo.refs)  # main is no pull request
        ref = f'refs/pr/{number}' if 'create_pr' in self.query else unquote(revision)
        oid = repo.commit(ref, {**repo.commits[oid], **sent})
        url = f'{self.hub.endpoint}/{repo_id}'
        told = {'pullRequestUrl': f'{url}/discussions/{number}'} if 'create_pr' in self.query else {}
        return {'commitUrl': f'{url}/commit/{oid}', 'commitOid': oid, **told}

    def read(self, repo_id: str, revision: str, path: str) -> tuple:
        repo, oid = self.find(repo_id, revision)
        if unquote(path) not in repo.commits[oid]:
            raise Refused(404, 'EntryNotFound', 'Entry not found')
        data = repo.commits[oid][unquote(path)]
        return data, {'X-Repo-Commit': oid, 'ETag': f'"{git_name(data)}"', 'Accept-Ranges': 'bytes'}

    ask = read


_ID, _REV = r'(?P<repo_id>[^/]+/[^/]+)', r'(?P<revision>[^/]+)'
_ROUTES = (
    ('POST /api/repos/create', 'create'),
    ('POST /api/validate-yaml', 'validate_yaml'),
    (f'POST /api/models/{_ID}/preupload/{_REV}', 'preupload'),
    (f'POST /api/models/{_ID}/commit/{_REV}', 'commit'),
    (f'GET /api/models/{_ID}/tree/{_REV}', 'tree'),
    (f'GET /api/models/{_ID}', 'info'),
    (f'GET /api/models/{_ID}/revision/{_REV}', 'info'),
    (f'HEAD /{_ID}/resolve/{_REV}/(?P<path>.+)', 'ask'),
    (f'GET /{_ID}/resolve/{_REV}/(?P<path>.+)', 'read'),
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh HubServer; this process's huggingface_hub talks to it as its owner, with an empty cache, unhurried."""
    from huggingface_hub import constants
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
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
    yield server
    server.http.shutdown()
    server.http.server_close()
