"""Push and download with the real client, against a stand-in for the Hub's HTTP interface on this machine."""

import base64
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from audiosep import hub
from audiosep.errors import ModelError

ROOT = Path(__file__).parents[1]
TOKEN = "a token of nobody"


class StandIn(ThreadingHTTPServer):
    """Repositories in memory: commits, objects of large files, and what is to go wrong."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits = {}  # repo -> [(commit, {path: bytes})], the last one is main
        self.objects = {}  # sha256 -> bytes
        self.requests = []
        self.cuts = []  # bytes after which the next downloads of weights break off; 0: they are answered with 500
        self.starts = []  # of each download of weights, the first byte
        self.refuse = 0  # commits to answer with 500

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo, revision):
        """(commit, files) of a revision, None when it isn't there."""
        known = self.commits.get(repo, [])
        if revision == "main":
            return known[-1] if known else None
        return next((entry for entry in known if entry[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code):
        self.answer(404, {"error": code}, X_Error_Code=code)

    def parts(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_GET(self):
        match self.parts():
            case ["api", "models", org, name, *rest]:
                self.describe(f"{org}/{name}", rest)
            case [org, name, "resolve", revision, *path]:
                self.download(f"{org}/{name}", revision, "/".join(path))
            case _:
                self.missing("EntryNotFound")

    do_HEAD = do_GET

    def describe(self, repo, rest):
        if repo not in self.server.commits:
            return self.missing("RepoNotFound")
        found = self.server.files(repo, rest[1] if rest else "main")
        if found is None:
            return self.missing("RevisionNotFound")
        commit, files = found
        if rest and rest[0] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self.answer(200, entries)
        siblings = [{"rfilename": path} for path in files]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})

    def download(self, repo, revision, path):
        if repo not in self.server.commits:
            return self.missing("RepoNotFound")
        found = self.server.files(repo, revision)
        if found is None:
            return self.missing("RevisionNotFound")
        if path not in found[1]:
            return self.missing("EntryNotFound")
        data = found[1][path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": found[0], "Accept_Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        status, size, end = 206 if start else 200, len(data) - start, len(data)
        if self.command == "GET" and path == hub.WEIGHTS:
            self.server.starts.append(start)
            if self.server.cuts:
                end = self.server.cuts.pop(0)
                self.close_connection = True
        if not end:
            return self.answer(500, {"error": "out of order"})
        return self.answer(status, data[start:end], Content_Length=str(size), **headers)

    def do_PUT(self):
        parts = self.parts()
        content = self.body()
        self.server.objects[parts[-1]] = content
        self.answer(200)

    def do_POST(self):
        parts, content = self.parts(), self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "who are you?"})
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(content)
                repo = f"{asked['organization']}/{asked['name']}"
                status = 409 if repo in self.server.commits else 200
                self.server.commits.setdefault(repo, [])
                return self.answer(status, {"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})
            case ["api", "validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(content)["files"]
                ]
                return self.answer(200, {"files": modes})
            case [*_, "info", "lfs", "objects", "batch"]:
                return self.answer(200, {"transfer": "basic", "objects": self.batch(json.loads(content))})
            case ["api", "models", org, name, "commit", "main"]:
                return self.commit(f"{org}/{name}", content)
        return self.missing("EntryNotFound")

    def batch(self, asked):
        for entry in asked["objects"]:
            if entry["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/objects/{entry['oid']}"}}
        return asked["objects"]

    def commit(self, repo, content):
        if self.server.refuse:
            self.server.refuse -= 1
            return self.answer(500, {"error": "out of order"})
        known = self.server.commits[repo]
        files = dict(known[-1][1]) if known else {}
        for line in content.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = hashlib.sha1(content).hexdigest()
        known.append((commit, files))
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return self.answer(200, {"commitUrl": url, "commitOid": commit})


@pytest.fixture
def server():
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def checkpoint(tiny_prior, tmp_path):
    return hub.save_prior(tiny_prior(num_classes=2), tmp_path / "tiny", {"licence": "CC0-1.0"})


@pytest.fixture
def large(server, checkpoint):
    """A checkpoint on the Hub, of weights that the client reads in two pieces; their bytes."""
    weights = save({"noise": torch.randint(256, (12 * 2**20,), dtype=torch.uint8)})
    config = json.loads((checkpoint / hub.CONFIG).read_text()) | {"sha256": hashlib.sha256(weights).hexdigest()}
    server.commits["org/large"] = [("1" * 40, {hub.CONFIG: json.dumps(config).encode(), hub.WEIGHTS: weights})]
    return weights


@pytest.fixture
def audiosep(server, tmp_path):
    """Run the real command with the real client."""

    def run(*arguments, **changes):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | changes
        words = [sys.executable, "-m", "audiosep", *map(str, arguments)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def command(audiosep):
    return functools.partial(audiosep, "models")


@pytest.mark.slow
def test_a_checkpoint_goes_to_the_hub_and_back(server, checkpoint, command):
    pushed = command("push", checkpoint, "org/tiny")
    assert pushed.returncode == 0, pushed.stderr
    commit, files = server.files("org/tiny", "main")
    assert pushed.stdout.strip() == f"{server.url}/org/tiny/commit/{commit}"
    assert files == {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    assert files[hub.CARD].decode().startswith("---\nlibrary_name: audiosep")

    fetched = command("download", "org/tiny")
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(fetched.stdout.strip())
    assert folder.name == commit
    assert hub.load_prior(folder).classes == ("Class_0", "Class_1")
    assert hub.load_prior(folder).origin["revision"] == commit
    assert command("download", f"org/tiny@{commit}").stdout == fetched.stdout

    server.requests.clear()  # what is cached needs no network
    info = command("info", "org/tiny")
    assert info.returncode == 0, info.stderr
    assert "Class_1" in info.stdout
    assert not server.requests
    assert command("info", "org/tiny", HF_HUB_OFFLINE="1").returncode == 0


@pytest.mark.slow
def test_what_was_sent_is_not_sent_again(server, checkpoint, command):
    server.refuse = 1
    failed = command("push", checkpoint, "org/tiny")
    assert failed.returncode == 3
    assert "the Hub answers 500" in failed.stderr
    assert command("push", checkpoint, "org/tiny").returncode == 0
    assert sum(request.startswith("PUT") for request in server.requests) == 1
    assert server.files("org/tiny", "main")[1].keys() == {hub.CONFIG, hub.WEIGHTS, hub.CARD}


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on(server, large, command):
    server.cuts = [11 * 2**20]
    fetched = command("download", "org/large")
    assert fetched.returncode == 0, fetched.stderr
    assert server.starts == [0, 10 * 2**20]  # what the client had read of the first
    assert (Path(fetched.stdout.strip()) / hub.WEIGHTS).read_bytes() == large


@pytest.mark.slow
def test_a_download_that_failed_can_be_had_again(server, large, command):
    server.cuts = [11 * 2**20, 0]
    failed = command("download", "org/large")
    assert failed.returncode == 3
    assert "the Hub answers 500" in failed.stderr
    assert server.starts == [0, 10 * 2**20]
    fetched = command("download", "org/large")
    assert fetched.returncode == 0, fetched.stderr
    assert (Path(fetched.stdout.strip()) / hub.WEIGHTS).read_bytes() == large


@pytest.mark.slow
def test_a_repository_without_weights_says_so(server, large, command):
    del server.commits["org/large"][0][1][hub.WEIGHTS]
    said = command("download", "org/large").stderr
    assert "no model.safetensors; it is the same on the Hub" in said


@pytest.mark.slow
def test_a_copy_that_may_be_old_is_named(server, checkpoint, command):
    server.commits["org/tiny"] = [("1" * 40, {path.name: path.read_bytes() for path in checkpoint.iterdir()})]
    fetched = command("download", "org/tiny")
    assert fetched.returncode == 0
    assert not fetched.stderr
    gone = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    cached = command("download", "org/tiny", **gone)
    assert cached.stdout == fetched.stdout
    [said] = cached.stderr.splitlines()
    assert said.startswith("org/tiny: the Hub can't be reached (")
    assert said.endswith("); this is the copy fetched before, revision " + "1" * 40)
    asked_for = (["org/tiny@" + "1" * 40], gone), (["org/tiny"], {"HF_HUB_OFFLINE": "1"})
    for words, changes in asked_for:
        cached = command("download", *words, **changes)
        assert (cached.stdout, cached.stderr) == (fetched.stdout, "")


@pytest.mark.slow
def test_a_damaged_cache_is_mended_by_the_command_that_the_error_names(server, checkpoint, command, audiosep, tmp_path):
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    server.commits["org/tiny"] = [("1" * 40, files)]
    folder = Path(command("download", "org/tiny").stdout.strip())

    def damage(name):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).resolve().write_bytes(data)

    damage(hub.WEIGHTS)
    said = audiosep("separate", "mix.wav", "-n", "org/tiny").stderr
    assert "sha256" in said
    words = re.search("`audiosep (.*)`", said)[1].split()
    assert words == ["models", "download", f"org/tiny@{folder.name}"]
    assert "damaged in the cache, and the Hub is not asked" in audiosep(*words, HF_HUB_OFFLINE="1").stderr
    assert audiosep(*words).returncode == 0
    assert hub.load_prior(folder).classes == ("Class_0", "Class_1")

    damage(hub.CONFIG)
    with pytest.raises(ModelError, match=f"can't be read .*; `audiosep models download org/tiny@{folder.name}`"):
        hub.load_prior(folder)
    assert command("download", "org/tiny").stdout.strip() == str(folder)
    assert hub.load_prior(folder).classes == ("Class_0", "Class_1")

    files[hub.WEIGHTS] = files[hub.WEIGHTS][:-1] + b"x"
    never = command("download", "org/tiny", HF_HOME=str(tmp_path / "other"))
    assert never.returncode == 3
    assert "it is the same on the Hub" in never.stderr


@pytest.mark.slow
def test_what_cannot_be_had_says_why(server, checkpoint, command):
    def said(*arguments, **changes):
        result = command(*arguments, **changes)
        assert result.returncode == 3
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        return result.stderr

    assert "no such repository" in said("download", "org/none")
    assert "HF_TOKEN" in said("push", checkpoint, "org/tiny", HF_TOKEN="wrong")
    server.commits["org/tiny"] = []
    assert command("push", checkpoint, "org/tiny").returncode == 0
    assert "not this revision" in said("download", "org/tiny@v9")
    assert "can't be reached" in said("download", "org/other", HF_ENDPOINT="http://127.0.0.1:1")
    assert "as HF_HUB_OFFLINE is set" in said("download", "org/other", HF_HUB_OFFLINE="1")
    assert "allows: Cannot have -- or .. in repo_id: 'org/a--b'" in said("download", "org/a--b")
    assert "is not org/name" in said("push", checkpoint, "tiny")
    (checkpoint / hub.WEIGHTS).write_bytes((checkpoint / hub.WEIGHTS).read_bytes()[:-1] + b"x")
    assert "sha256" in said("push", checkpoint, "org/tiny")
