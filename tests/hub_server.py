"""A small local Hub for tests: as much of its HTTP API as the real huggingface_hub client needs.

Repositories are private or public, hold commits, branches and pull requests, and keep LFS files by their SHA-256.
`fault()` makes one step fail. With the fixture `hub`, the client in the test's own process talks to the server, with
the owner's token; a subprocess gets `env=hub.env(cache=folder)`. What the server answers follows the client's own
source and the Hub's documented API.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Dict, List, NamedTuple, Optional

import pytest

LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt')  # what the Hub's default .gitattributes sends to LFS
GITATTRIBUTES = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'


class File(NamedTuple):
    data: bytes
    lfs: bool

    @property
    def blob(self) -> str:
        """Git's name of the file: SHA-1 of the content, or of the pointer that stands for an LFS file."""
        data = self.data
        if self.lfs:
            data = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n'.encode()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob

    def describe(self, path: str) -> dict:
        lfs = {'lfs': {'oid': self.sha256, 'size': len(self.data), 'pointerSize': 134}} if self.lfs else {}
        return {'type': 'file', 'path': path, 'size': len(self.data), 'oid': self.blob, **lfs}


class Repo:
    def __init__(self, private: bool, files: Dict[str, File]):
        self.private = private
        self.commits: Dict[str, Dict[str, File]] = {}
        self.refs: Dict[str, str] = {}
        self.pull_requests: List[int] = []
        self.commit('main', files)

    def commit(self, ref: str, files: Dict[str, File]) -> str:
        content = repr((len(self.commits), self.refs.get(ref), sorted((p, f.blob) for p, f in files.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> Optional[str]:
        revision = urllib.parse.unquote(revision)
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """The server, started on a free port of the loopback interface. `tokens` maps a token to what it may write."""

    def __init__(self):
        self.repos: Dict[str, Repo] = {}
        self.lfs: Dict[str, bytes] = {}
        self.tokens = {'hf_owner': ['owner'], 'hf_reader': []}
        self.requests = []  # 'METHOD path' of each request
        self.faults: Dict[str, list] = {}
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.endpoint = f'http://127.0.0.1:{self.http.server_address[1]}'
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add_repo(self, repo_id: str, files: Dict[str, bytes]) -> str:
        """Puts a public repository there as if it had been pushed long ago. Returns its commit."""
        stored = {path: File(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        self.lfs.update({file.sha256: file.data for file in stored.values() if file.lfs})
        self.repos[repo_id] = Repo(False, stored)
        return self.repos[repo_id].refs['main']

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        repo = self.repos[repo_id]
        return {path: file.data for path, file in repo.commits[repo.resolve(revision)].items()}

    def snapshot(self) -> dict:
        """All that a visitor sees: each repository's branches, their files, and its pull requests."""
        return {
            name: ({ref: self.files(name, ref) for ref in repo.refs}, [*repo.pull_requests])
            for name, repo in self.repos.items()
        }

    def fault(self, kind: str, step: str, times: int = 10**6) -> None:
        """Makes a step fail so many times.

        Args:
            kind: 'drop' closes the connection half way through the body, '500' answers so, 'corrupt' flips one bit of
                what is sent (step 'read'), or gives other hashes (step 'tree').
            step: One of those in _ROUTES, or 'answer', a commit that is done but whose answer never arrives.
        """
        assert step == 'answer' or step in [route[2] for route in _ROUTES]
        self.faults[step] = [kind, times]

    def take_fault(self, step: str) -> Optional[str]:
        kind, times = self.faults.get(step, (None, 0))
        if times > 0:
            self.faults[step][1] -= 1
            return kind
        return None

    def env(self, cache, token: Optional[str] = None, **extra: str) -> dict:
        """The environment of a subprocess whose huggingface_hub talks to this server, with its own cache folder."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
        env.update(
            HF_ENDPOINT=self.endpoint,
            HF_HOME=str(cache),
            HF_HUB_CACHE=os.path.join(str(cache), 'hub'),
            HF_HUB_DISABLE_XET='1',
            HF_HUB_DISABLE_TELEMETRY='1',
            **({'HF_TOKEN': token} if token else {}),
            **extra,
        )
        return env


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    # Answers

    def answer(self, status: int, body=b'', headers: Optional[dict] = None, send: Optional[bytes] = None) -> None:
        """`send`: what goes out in place of the body (corrupted or cut short), under the body's own headers."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {'Content-Type': 'application/json', **(headers or {})}
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body if send is None else send)

    def error(self, status: int, code: str = '', message: str = '') -> None:
        self.answer(status, {'error': message}, {'X-Error-Code': code, 'X-Error-Message': message})

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    # Requests

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query)
        self.hub.requests.append(f'{self.command} {self.path}')
        for methods, pattern, step, name in _ROUTES:
            match = self.command in methods.split() and re.fullmatch(pattern, url.path)
            if not match:
                continue
            fault = self.hub.take_fault(step)
            if fault == 'drop' and step != 'read':
                self.rfile.read(int(self.headers.get('Content-Length', 0)) // 2)
                return self.drop()
            self.data = self.body()
            if fault == '500':
                return self.error(500, message='Internal Server Error')
            self.fault = fault
            return getattr(self, name)(**match.groupdict())
        self.body()
        self.error(404, message=f'no such endpoint: {self.command} {url.path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    @property
    def json(self) -> dict:
        return json.loads(self.data)

    def writable(self) -> Optional[list]:
        return self.hub.tokens.get(self.headers.get('Authorization', '').removeprefix('Bearer '))

    def repo(self, repo_id: str, write: bool = False) -> Optional[Repo]:
        """The repository, or None after an error was answered."""
        writable = self.writable()
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self.error(401 if writable is None else 404, 'RepoNotFound', 'Repository not found')
        if write and writable is None:
            return self.error(401, '', 'Invalid username or password.')
        if write and repo_id.split('/')[0] not in writable and 'create_pr' not in self.query:
            return self.error(403, '', 'Forbidden: you must use a token with write access to this repository')
        return repo

    def find(self, repo_id: str, revision: str):
        repo = self.repo(repo_id)
        oid = repo and repo.resolve(revision)
        if repo and oid is None:
            self.error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return repo, oid

    def create(self) -> None:
        repo_id = f'{self.json["organization"]}/{self.json["name"]}'
        if self.writable() is None:
            return self.error(401, '', 'Invalid username or password.')
        if self.json['organization'] not in self.writable():
            return self.error(403, '', f"You don't have the rights to create a model under {self.json['organization']}")
        url = {'url': f'{self.hub.endpoint}/{repo_id}'}
        if repo_id in self.hub.repos:
            return self.answer(409, {'error': 'You already created this model repo', **url})
        private = self.json.get('visibility') == 'private' or bool(self.json.get('private'))
        self.hub.repos[repo_id] = Repo(private, {'.gitattributes': File(GITATTRIBUTES, False)})
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
            files = repo.commits[oid]
            if self.fault == 'corrupt':
                files = {path: file._replace(data=file.data + b'!') for path, file in files.items()}
            self.answer(200, [file.describe(path) for path, file in files.items()])

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        if repo:
            files = repo.commits[repo.resolve(revision)]
            answers = []
            for path in (file['path'] for file in self.json['files']):
                mode = 'lfs' if path.endswith(LFS_SUFFIXES) else 'regular'
                oid = files[path].etag if path in files else None
                answers.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
            self.answer(200, {'files': answers})

    def batch(self, repo_id: str) -> None:
        if self.repo(repo_id):
            objects = []
            for item in self.json['objects']:
                if item['oid'] not in self.hub.lfs:
                    href = f'{self.hub.endpoint}/lfs/{item["oid"]}'
                    item = {**item, 'actions': {'upload': {'href': href}}}
                objects.append(item)
            self.answer(200, {'transfer': 'basic', 'objects': objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            return self.error(400, '', 'the content does not match its SHA-256')
        self.hub.lfs[oid] = self.data
        self.answer(200)

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        _, *operations = [json.loads(line) for line in self.data.splitlines()]
        create_pr = 'create_pr' in self.query
        files = dict(repo.commits[repo.resolve(revision)])
        for operation in operations:
            value = operation['value']
            if operation['key'] == 'file':
                files[value['path']] = File(base64.b64decode(value['content']), False)
            else:
                assert operation['key'] == 'lfsFile', operation['key']
                files[value['path']] = File(self.hub.lfs[value['oid']], True)
        number = len(repo.pull_requests) + 1
        ref = f'refs/pr/{number}' if create_pr else urllib.parse.unquote(revision)
        oid = repo.commit(ref, files)
        url = f'{self.hub.endpoint}/{repo_id}'
        answer = {'commitUrl': f'{url}/commit/{oid}', 'commitOid': oid}
        if create_pr:
            repo.pull_requests.append(number)
            answer['pullRequestUrl'] = f'{url}/discussions/{number}'
        if self.hub.take_fault('answer'):
            return self.drop()
        self.answer(200, answer)

    def read(self, repo_id: str, revision: str, path: str) -> None:
        repo, oid = self.find(repo_id, revision)
        if oid is None:
            return
        file = repo.commits[oid].get(urllib.parse.unquote(path))
        headers = {'X-Repo-Commit': oid}
        if file is None:
            return self.answer(404, b'', {**headers, 'X-Error-Code': 'EntryNotFound'})
        data, send = file.data, None
        headers.update({'ETag': f'"{file.etag}"', 'Accept-Ranges': 'bytes'})
        if self.fault == 'corrupt':
            middle = len(data) // 2
            send = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        elif self.fault == 'drop':
            send = b''
        self.answer(200, data, headers, send)
        if self.fault == 'drop':
            self.drop()


_ID, _REV = r'(?P<repo_id>[^/]+/[^/]+)', r'(?P<revision>[^/]+)'
_ROUTES = (
    ('POST', '/api/repos/create', 'create', 'create'),
    ('POST', '/api/validate-yaml', 'yaml', 'validate_yaml'),
    ('POST', f'/api/models/{_ID}/preupload/{_REV}', 'preupload', 'preupload'),
    ('POST', f'/api/models/{_ID}/commit/{_REV}', 'commit', 'commit'),
    ('GET', f'/api/models/{_ID}/tree/{_REV}', 'tree', 'tree'),
    ('GET', f'/api/models/{_ID}', 'info', 'info'),
    ('GET', f'/api/models/{_ID}/revision/{_REV}', 'info', 'info'),
    ('POST', rf'/{_ID}\.git/info/lfs/objects/batch', 'batch', 'batch'),
    ('PUT', r'/lfs/(?P<oid>\w+)', 'upload', 'upload'),
    ('HEAD', f'/{_ID}/resolve/{_REV}/(?P<path>.+)', 'info', 'read'),
    ('GET', f'/{_ID}/resolve/{_REV}/(?P<path>.+)', 'read', 'read'),
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh HubServer; this process's huggingface_hub talks to it as its owner, with an empty cache, unhurried."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    server = HubServer()
    monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
    )
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
