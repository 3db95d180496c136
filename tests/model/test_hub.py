"""Fetching from the hub, against a small server that speaks the part of its protocol that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from moeray.errors import CheckpointError
from moeray.model.checkpoint import Checkpoint, resolve
from moeray.model.family import load_family
from moeray.model.slices import WeightMap
from tests.checkpoints import make_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-moe"


class Hub(ThreadingHTTPServer):
    """Serves `folder` as the repository REPO; `fetched` lists the files whose bytes were sent, `glanced_at` those of
    which a part was asked for."""

    daemon_threads = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: list[str] = []
        self.glanced_at: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    headers_alone = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in self.files()]
            self.send(200, json.dumps(files).encode(), with_body=with_body)
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": p.name} for p in self.files()]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self.send(200, json.dumps(info).encode(), with_body=with_body)
        elif path.startswith(f"/{REPO}/resolve/"):
            self.file(path.rpartition("/")[2], with_body=with_body)
        else:
            self.send(404, b"", with_body=with_body, headers={"X-Error-Code": "RepoNotFound"})

    def files(self) -> list[Path]:
        return sorted(self.server.folder.iterdir())

    def file(self, name: str, *, with_body: bool) -> None:
        path = self.server.folder / name
        if not path.is_file():
            self.send(404, b"", with_body=with_body, headers={"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        if with_body and (asked := self.headers.get("Range")):
            content = content[: int(asked.rpartition("-")[2]) + 1] if self.headers_alone else b"{}"
            self.server.glanced_at.append(name)
        elif with_body:
            self.server.fetched.append(name)
        etag = hashlib.sha256(content).hexdigest()
        self.send(200, content, with_body=with_body, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def send(self, code: int, body: bytes, *, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(make_tiny("mixtral", tmp_path / "repo", shard_bytes=60_000, tokenizer=True))
    (server.folder / "README.md").write_text("tiny")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def weights_of(checkpoint: Checkpoint) -> WeightMap:
    family = load_family(checkpoint.config)
    return WeightMap.build(family.full, checkpoint, family.expert_counts())


def test_only_the_files_that_the_slices_need_are_fetched(hub: Hub) -> None:
    source = resolve(REPO, None, node="here")
    assert source.revision == COMMIT
    checkpoint = Checkpoint.open(source)
    weights = weights_of(checkpoint)
    size = weights.expert_bytes("model.layers.1.mlp.experts.down_proj")
    weights.trunk_bytes()
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    assert "README.md" not in hub.fetched
    assert (source.metadata_dir() / "tokenizer.json").is_file()

    row = weights.expert("model.layers.1.mlp.experts.down_proj", 3)
    assert row.nbytes == size
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    local = Checkpoint.open(resolve(str(hub.folder), None, node="here"))
    assert torch.equal(row.dense(torch.float32), local.tensor(key))
    fetched = [name for name in hub.fetched if name.endswith(".safetensors")]
    assert fetched == [local.file_of(key)]
    assert source.at_hand(fetched[0]) is not None
    weights.trunk_state_dict()
    assert {n for n in hub.fetched if n.endswith(".safetensors")} == weights.files_for_trunk() | set(fetched)


@pytest.mark.parametrize("can", [True, False])
def test_for_a_dtype_that_the_config_does_not_name_a_header_is_enough(
    hub: Hub, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps({**config, "dtype": None}))
    if not can:
        monkeypatch.setattr(Handler, "headers_alone", False)
    checkpoint = Checkpoint.open(resolve(REPO, None, node="here"))
    assert checkpoint.config.dtype is torch.float32
    first = checkpoint.file_of(min(checkpoint.keys()))
    assert hub.glanced_at == [first]
    assert [name for name in hub.fetched if name.endswith(".safetensors")] == ([] if can else [first])


def test_a_file_is_fetched_once_by_many(hub: Hub) -> None:
    source = resolve(REPO, None, node="here")
    name = "model.safetensors.index.json"
    shard = sorted(json.loads(source.path_of(name).read_text())["weight_map"].values())[0]
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: source.path_of(shard), range(8)))
    assert len(paths) == 1
    assert hub.fetched.count(shard) == 1


def test_nodes_agree_on_the_fingerprint(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Checkpoint.open(resolve(REPO, None, node="one"))
    weights_of(first).trunk_state_dict()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache of another node"))
    assert Checkpoint.open(resolve(REPO, COMMIT, node="two")).fingerprint == first.fingerprint


def test_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    resolve(REPO, None, node="here")
    assert "Bearer hf_of_a_test" in hub.tokens


def test_missing_repository_and_file(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"someone/else .*on node here: there is no such folder"):
        resolve("someone/else", None, node="here")
    source = resolve(REPO, None, node="here")
    with pytest.raises(CheckpointError, match=r"file nothing.safetensors of model .*has no such file"):
        source.path_of("nothing.safetensors")


def test_unreachable_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(REPO, None, node="here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPO, COMMIT, node="here") == source
    assert Checkpoint.open(source).config.model_type == "mixtral"
    with pytest.raises(CheckpointError, match=r"file model-[0-9a-z-]+\.safetensors .*could not be reached") as caught:
        source.path_of("model-00001-of-00009.safetensors")
    assert "\n" not in str(caught.value)


def test_local_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model folder /no/such/folder is not there on node here"):
        resolve("/no/such/folder", None, node="here")
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "x.gguf"), None, node="here")
    with pytest.raises(CheckpointError, match=r"config.json is not there on node here"):
        resolve(str(tmp_path), None, node="here")
