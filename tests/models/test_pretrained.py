"""Public weights: a server in this process plays the release and the hub."""

import argparse
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models import pretrained, zoo
from irpe_ds.models.build import build_model

ZOO_K = "deit_tiny_patch16_224_ctx_product_50_shared_k"
NARROW = {"depth": 1, "embed_dim": 24, "num_heads": 2}
TABLE = "blocks.0.attn.rpe_k.lookup_table_weight"


def config(name: str = ZOO_K, **values: Any) -> ModelConfig:
    return ModelConfig(**{"img_size": 32, "options": NARROW, **values}, name=name)


class Server(SimpleHTTPRequestHandler):
    """Files of a folder; counts what it sends."""

    sent: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.sent.append(self.path)
        super().do_GET()


@pytest.fixture
def sent() -> list[str]:
    """Paths that the server was asked for."""
    return []


@pytest.fixture
def server(tmp_path: Path, sent: list[str]) -> Iterator[str]:
    (tmp_path / "public").mkdir()
    handler = type("Handler", (Server,), {"sent": sent})
    serve = partial(handler, directory=str(tmp_path / "public"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def source() -> nn.Module:
    """A model of the zoo as it could have been released."""
    model = build_model(config())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def save(source: nn.Module, path: Path) -> Path:
    args = argparse.Namespace(model=ZOO_K)
    torch.save({"model": source.state_dict(), "args": args}, path)
    return path


@pytest.fixture
def release(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server in place of the release."""
    known = pretrained.timm.models.get_pretrained_cfg(ZOO_K)
    monkeypatch.setattr(known, "url", f"{server}/{ZOO_K}.pth")
    monkeypatch.setattr(pretrained.timm.models, "get_pretrained_cfg", lambda _: known)


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(config(**values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("release")
class TestRelease:
    def test_a_run_starts_from_it(
        self, source: nn.Module, sent: list[str], tmp_path: Path, cache: Path
    ) -> None:
        """Downloaded once, other classes get a new head; a run that resumes does not ask."""
        save(source, tmp_path / "public" / f"{ZOO_K}.pth")
        for classes in (1000, 10):
            model = build_model(config(pretrained=True, num_classes=classes))
            assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])
        assert sent == [f"/{ZOO_K}.pth"]
        assert (cache / f"{ZOO_K}.pth").is_file()
        build_model(config(pretrained=True).without_weights())
        assert len(sent) == 1

    def test_a_file_beside(self, source: nn.Module, sent: list[str], tmp_path: Path) -> None:
        save(source, tmp_path / f"{ZOO_K}.pth")
        model = build_model(config(pretrained=True))
        assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])
        assert sent == []

    def test_none(self) -> None:
        message = (
            r"^model\.pretrained: expected a file at http://.*pth, got HTTP 404 File not found"
        )
        with pytest.raises(ConfigError, match=message):
            build_model(config(pretrained=True))


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "urlopen", fail)
    url = f"{zoo.RELEASES}/{ZOO_K}.pth"
    assert refusal(pretrained=True) == (
        f"model.pretrained: expected a network, or {url} copied to {ZOO_K}.pth or "
        f"{cache / ZOO_K}.pth (or model.pretrained=false to start anew), got no route to host"
    )
    message = refusal(weights="https://example.org/vit-0123456789.pth")
    copied = f"https://example.org/vit-0123456789.pth copied to {cache}/vit-0123456789.pth"
    assert message == f"model.weights: expected a network, or {copied}, got no route to host"


def test_not_released() -> None:
    name = "deit_small_patch16_224_ctx_euc_20_shared_k"
    with pytest.raises(ConfigError, match=r"^model\.pretrained: expected a model of which weights"):
        build_model(config(name, pretrained=True))


class TestUrl:
    def test_its_hash(self, source: nn.Module, server: str, tmp_path: Path, cache: Path) -> None:
        path = save(source, tmp_path / "weights.pth")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        right, wrong = f"vit-{digest[:8]}.pth", "vit-0123abcd.pth"
        for name in (right, wrong):
            (tmp_path / "public" / name).write_bytes(path.read_bytes())
        model = build_model(config(weights=f"{server}/{right}"))
        assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])
        message = refusal(weights=f"{server}/{wrong}")
        assert message == (
            "model.weights: expected a file with the SHA-256 of its name, 0123abcd, got "
            f"{digest} of {server}/{wrong}"
        )
        assert {path.name for path in cache.iterdir()} >= {right}
        assert not (cache / wrong).exists()

    def test_files_of_one_name(self, source: nn.Module, server: str, tmp_path: Path) -> None:
        tables = []
        for folder in ("one", "two"):
            nn.init.normal_(source.state_dict()[TABLE])
            (tmp_path / "public" / folder).mkdir()
            save_file(source.state_dict(), tmp_path / "public" / folder / "model.safetensors")
            model = build_model(config(weights=f"{server}/{folder}/model.safetensors"))
            assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])
            tables.append(model.state_dict()[TABLE])
        assert not torch.equal(*tables)

    def test_cut_short(self, monkeypatch: pytest.MonkeyPatch, server: str, tmp_path: Path) -> None:
        (tmp_path / "public" / "a.pth").write_bytes(b"x" * 100)
        monkeypatch.setattr(Server, "copyfile", lambda _, __, out: out.write(b"x" * 10))
        message = refusal(weights=f"{server}/a.pth")
        assert "got the connection ended after 10 of 100 bytes" in message

    def test_ranks_wait_for_one(
        self, source: nn.Module, server: str, sent: list[str], tmp_path: Path
    ) -> None:
        save(source, tmp_path / "public" / "a.pth")
        fetch = partial(pretrained.local_file, f"{server}/a.pth", "model.weights")
        threads = [threading.Thread(target=fetch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sent == ["/a.pth"]


class TestHub:
    @pytest.fixture(autouse=True)
    def reachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pretrained, "check_hub", lambda *_: None)

    @pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
    def test_a_repository(
        self, file: str, source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / file
        if file.endswith("bin"):
            save(source, path)
        else:
            save_file(source.state_dict(), path)

        def download(repository: str, name: str, revision: str | None) -> str:
            assert (repository, revision) == ("owner/name", "v1")
            if not (tmp_path / name).exists():
                raise EntryNotFoundError(name)
            return str(tmp_path / name)

        monkeypatch.setattr(pretrained, "hf_hub_download", download)
        model = build_model(config(weights="hf-hub:owner/name@v1"))
        assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise LocalEntryNotFoundError("no connection\nand more")

        monkeypatch.setattr(pretrained, "hf_hub_download", fail)
        assert refusal(weights="hf-hub:owner/name") == (
            "model.weights: expected a network, or model.weights=FILE, a copy of "
            "hf-hub:owner/name's model.safetensors, got no connection"
        )


def test_a_folder_of_an_export(source: nn.Module, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = build_model(config(weights=tmp_path))
    assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE])
