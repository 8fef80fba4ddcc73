"""Public weights: of a URL, of Hugging Face's hub or of a released model, downloaded once.

They lie in the caches of torch.hub and of huggingface_hub; a file that is there needs no network.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import timm
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch.hub import get_dir

from irpe_ds.cli import command
from irpe_ds.config_types import HUB
from irpe_ds.errors import ConfigError
from irpe_ds.files import atomic_write, lock_file
from irpe_ds.models.zoo import WEIGHTS

logger = logging.getLogger(__name__)
SECONDS = 30
"""Longest silence of a server."""
PIECE = 1 << 20
HASH = re.compile(r"-([0-9a-f]{8,})\.")
"""In the name of a file, as torch.hub has it: where its SHA-256 begins."""


def local_file(source: Path | str, where: str) -> Path:
    """The file of some weights on this machine; of the ranks of a node one downloads it.

    Args:
        source: a path; or an http:// or https:// URL, or hf-hub:OWNER/NAME, perhaps @REVISION.
        where: the key that names it.

    Raises:
        ConfigError: it cannot be downloaded; says where to put it instead.
    """
    if isinstance(source, Path):
        return source / WEIGHTS if (source / WEIGHTS).is_file() else source
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB), where)
    return _from_url(source, _cached(source), where)


def released(name: str) -> Path:
    """The released weights of a model of the zoo: ./NAME.pth, or in torch.hub's cache.

    Raises:
        ConfigError: the model has none, or they cannot be downloaded.
    """
    where, known = "model.pretrained", timm.models.get_pretrained_cfg(name)
    url = getattr(known, "url", None)
    if not url:
        raise ConfigError(
            where, f"a model of which weights are released ({command('launch/zoo.py')})", name
        )
    beside = Path(f"{name}.pth")
    return beside if beside.is_file() else _from_url(url, _cache() / beside, where, beside)


def _cache() -> Path:
    return Path(get_dir(), "checkpoints")


def _cached(url: str) -> Path:
    """Where the file of a URL is kept: as torch.hub keeps it if its name has its hash.

    Else many have one name, such as model.safetensors, and the URL tells them apart.
    """
    name = Path(unquote(urlparse(url).path)).name or "weights"
    own = "" if HASH.search(name) else hashlib.sha256(url.encode()).hexdigest()[:12]
    return _cache() / own / name


def _from_url(url: str, path: Path, where: str, *others: Path) -> Path:
    """The file in the cache, downloaded if it is not there; `others` are where it could be too."""
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # another rank has downloaded it by now
                logger.warning("downloading %s to %s", url, path)
                _download(url, path, where)
    except HTTPError as error:
        raise ConfigError(where, f"a file at {url}", f"HTTP {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        places = " or ".join(str(place) for place in (*others, path))
        anew = " (or model.pretrained=false to start anew)" if where == "model.pretrained" else ""
        raise ConfigError(where, f"a network, or {url} copied to {places}{anew}", error) from None
    return path


def _download(url: str, path: Path, where: str) -> None:
    digest, size = hashlib.sha256(), 0
    with (
        urlopen(url, timeout=SECONDS) as answer,
        atomic_write(path) as partial,
        partial.open("wb") as file,
    ):
        while piece := answer.read(PIECE):
            digest.update(piece)
            size += file.write(piece)
        length = int(answer.headers.get("Content-Length") or size)
        if size != length:
            raise OSError(f"the connection ended after {size} of {length} bytes")
        named = HASH.search(path.name)
        if named and not digest.hexdigest().startswith(named[1]):
            expected = f"a file with the SHA-256 of its name, {named[1]}"
            raise ConfigError(where, expected, f"{digest.hexdigest()} of {url}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While entered, no other process is; waits for it."""
    while True:
        try:
            file = lock_file(path)
            break
        except BlockingIOError:
            time.sleep(0.2)
    with file:
        yield


def _from_hub(name: str, where: str) -> Path:
    """A repository's model.safetensors, or pytorch_model.bin, in huggingface_hub's cache."""
    repository, _, revision = name.partition("@")
    try:
        check_hub(repository, revision or None)
        for file in (WEIGHTS, "pytorch_model.bin"):
            try:
                return Path(hf_hub_download(repository, file, revision=revision or None))
            except (LocalEntryNotFoundError, RepositoryNotFoundError):
                raise
            except EntryNotFoundError:
                continue
    except RepositoryNotFoundError:
        raise ConfigError(where, "a public repository of the hub, or a login", name) from None
    except Exception as error:  # of huggingface_hub, of httpx or of the system
        expected = f"a network, or {where}=FILE, a copy of {HUB}{name}'s {WEIGHTS}"
        raise ConfigError(where, expected, str(error).strip().partition("\n")[0]) from None
    raise ConfigError(where, f"{WEIGHTS} or pytorch_model.bin in it", f"{HUB}{name}")


def check_hub(repository: str | None, revision: str | None = None) -> None:
    """Raise OSError if Hugging Face cannot be reached, where it would be asked for minutes.

    Not needed once huggingface_hub (2.4) tells a host that it cannot resolve from a busy one.
    """
    files = (WEIGHTS, "pytorch_model.bin")
    if repository is None or os.environ.get("HF_HUB_OFFLINE"):
        return
    if any(
        isinstance(try_to_load_from_cache(repository, f, revision=revision), str) for f in files
    ):
        return
    check_network()


def check_network() -> None:
    """Raise OSError if Hugging Face cannot be reached."""
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:
        return  # it answers
