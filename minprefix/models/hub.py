"""Checkpoints from the hub: downloads only necessary files, with resume, and verifies them once.

`download` returns the folder of a model in the cache of `huggingface_hub` [1], which other programs
share; HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have the same meaning. It differs from
`hf_hub_download` in two ways: an interrupted download continues where it stopped, also in a new
process (version 2 starts the file again), and a file enters the cache only if its hash is right.

The hub's etag of a large (LFS) file, such as weights, is its sha256; for other files only the size
is checked. Partial files and the record of verified files are in `.minprefix/` in the model's
folder of the cache. `weight_paths` finds the files that hold the weights.
[1] https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import HfFileMetadata, http_get, repo_folder_name
from huggingface_hub.file_download import try_to_load_from_cache as find_cached
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

from minprefix.files import flush, read_json, rename, write_text
from minprefix.limits import PIECE
from minprefix.transfer import download_within_limits

NANOGPT = "ckpt.pt"  # weights and sizes, of nanoGPT
# the forms that a checkpoint's weights may have, best first
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    NANOGPT,
)
# the two forms of a tokenizer, and optional files
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
OPTIONAL_FILES = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip

# the files in a folder of a prefix, from PEFT, adapter-hub, the authors' code or ours
PREFIX_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter.safetensors",
    "pytorch_adapter.bin", "prefix.safetensors", "config.json", "pytorch_model.bin",
)  # fmt: skip

constants.DOWNLOAD_CHUNK_SIZE = PIECE  # with 10 MB, a slow line would look like a dead one
SHA256 = re.compile(r"[0-9a-f]{64}")
BINARY = (".safetensors", ".bin")
UNVERIFIED = "%s: %s: the hub gives no sha256 of it, so only its size was checked"
log = logging.getLogger(__name__)


def weight_paths(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, whether or not all of them exist; [] = none.

    Raises:
        ValueError: an index without `weight_map`, or that names a file outside the folder.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            index = name.endswith(".index.json")
            return _shards(folder / name) if index else [folder / name]
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index names, in the same folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map from tensor names to files")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{index}: {name!r} is not the name of a file in the same folder")
    return [index.with_name(name) for name in sorted(set(weight_map.values()))]


@contextmanager
def _hub_errors(name: str, doing: str) -> Iterator[None]:
    """Turn errors of the hub's client into one line that names the model and what to do."""
    try:
        yield
    except hub_errors.OfflineModeIsEnabled as error:
        todo = "unset HF_HUB_OFFLINE or give a folder"
        cache = constants.HF_HUB_CACHE
        raise OSError(f"{name}: offline, and not complete in {cache} ({todo})") from error
    except hub_errors.GatedRepoError as error:
        todo = f"accept its terms at {constants.ENDPOINT}/{name} and run `hf auth login`"
        raise OSError(f"{name}: access is restricted: {todo}") from error
    except hub_errors.RepositoryNotFoundError as error:
        todo = "check the name; a private model needs `hf auth login`"
        where = f"neither a folder here nor a model on {constants.ENDPOINT}"
        raise ValueError(f"{name}: {where} ({todo})") from error
    except hub_errors.EntryNotFoundError:
        raise  # the caller knows which file is missing
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise OSError(f"{name}: {doing}: {constants.ENDPOINT} answered {status}") from error
    # the client's own class for every failure of a connection
    except (hub_errors.HTTPError, OSError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        todo = "check the network and run again to continue, or give a folder"
        raise OSError(f"{name}: {doing} from {constants.ENDPOINT}: {reason} ({todo})") from error


@dataclass(frozen=True)
class _Repo:
    """One commit of one model on the hub."""

    name: str  # such as gpt2 or distilbert/distilgpt2
    commit: str

    @property
    def folder(self) -> Path:
        """The model's folder in the cache, for all its commits."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model")

    def head(self, filename: str, doing: str = "requesting") -> HfFileMetadata:
        """Etag, size in bytes and commit of a file.

        Raises:
            EntryNotFoundError: the model has no such file. OSError, ValueError: as `download`.
        """
        url = hf_hub_url(self.name, filename, revision=self.commit)
        with _hub_errors(self.name, f"{doing} {filename}"):
            meta = get_hf_file_metadata(url)
            if not meta.commit_hash or not re.fullmatch(r"[\w-]+", meta.etag or ""):
                raise OSError("the answer has no commit or etag, so this is not a model hub")
            return meta

    def get(self, filename: str) -> Path | None:
        """The file in the cache, downloaded if necessary; None if the model has no such file."""
        path = find_cached(self.name, filename, revision=self.commit)
        if not isinstance(path, str):
            try:
                meta: Any = self.head(filename)
            except hub_errors.EntryNotFoundError:
                return None
            own = self.folder / ".minprefix"
            own.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(own / f"{meta.etag}.lock"):
                blob = self.folder / "blobs" / meta.etag
                if not blob.exists():
                    partial = own / f"{meta.etag}.partial"
                    self._download(filename, meta.size, partial)
                    flush(partial)
                    self._verify(partial, filename, meta.etag)
                    blob.parent.mkdir(exist_ok=True)
                    rename(partial, blob)
                    if not SHA256.fullmatch(meta.etag) and filename.endswith(BINARY):
                        log.warning(UNVERIFIED, self.name, filename)
            with _hub_errors(self.name, f"requesting {filename}"):
                path = hf_hub_download(self.name, filename, revision=self.commit)
        self.check(Path(path))
        return Path(path)

    def require(self, filename: str) -> Path:
        """`get`, but ValueError if the model does not have the file."""
        if (path := self.get(filename)) is None:
            raise ValueError(f"{self.name}: {constants.ENDPOINT} has no {filename} for it")
        return path

    def check(self, path: Path) -> None:
        """Verify a file of the cache, whose blob is named by its etag, unless it was verified."""
        if path.is_symlink():
            blob = path.parent / os.readlink(path)
            self._verify(blob, path.name, blob.name)

    def _download(self, filename: str, size: int | None, partial: Path) -> None:
        """Write the file to `partial`, continuing where an earlier download stopped."""
        url = hf_hub_url(self.name, filename, revision=self.commit)
        # compressed answers have no byte ranges
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with _hub_errors(self.name, f"downloading {filename}"), partial.open("ab") as file:
            begun = file.tell()

            def get(target: Any) -> None:
                http_get(
                    url, target, resume_size=begun, headers=headers, expected_size=size,
                    displayed_filename=filename,
                )  # fmt: skip

            try:
                download_within_limits(get, file, filename)
            except hub_errors.HfHubHTTPError as error:
                if error.response.status_code == 416:  # the partial file is too long
                    partial.unlink()
                raise

    def _verify(self, path: Path, filename: str, etag: str) -> None:
        """Compare a file's sha256 with its etag; the record of its size and time avoids repeats."""
        if not SHA256.fullmatch(etag):
            return
        record = self.folder / ".minprefix" / f"{etag}.verified"
        stat = path.stat()
        seen = f"{stat.st_size} {stat.st_mtime_ns}"
        if record.is_file() and record.read_bytes() == seen.encode():
            return
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != etag:
            path.unlink()
            raise ValueError(
                f"{self.name}: {filename} is damaged (sha256 {digest[:12]}..., the hub says "
                f"{etag[:12]}...); it was removed, run the command again to download it"
            )
        try:
            record.parent.mkdir(exist_ok=True)
            write_text(record, seen)
        except OSError:
            log.info("%s: the cache is read-only: %s is verified each time", self.name, filename)


def download(name: str, *, check: Callable[[Path], object]) -> Path:
    """The folder in the cache of the newest version of a model; downloads what is missing.

    Without a hub (HF_HUB_OFFLINE, no network) the version in the cache is used if it is complete.

    Args:
        name: the model's id on the hub, such as gpt2.
        check: called with the folder once config.json is there, before the weights are downloaded;
            raises ValueError if such a model is not supported.
    Raises:
        OSError: the hub or the disk failed; says what to do.
        ValueError: no such model, missing files, or a damaged file.
    """
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError as error:
        raise ValueError(
            f"{name!r}: neither a folder nor the name of a model on the hub"
        ) from error
    repo = _Repo(name, "main")
    try:
        newest: Any = repo.head("config.json", "no folder of this name, and requesting")
        repo = replace(repo, commit=newest.commit_hash)
    except hub_errors.EntryNotFoundError as error:
        raise ValueError(f"{name}: {constants.ENDPOINT} has no config.json for it") from error
    except (OSError, ValueError):
        if (folder := _complete_in_cache(repo)) is None:
            raise
        check(folder)
        return folder

    folder = repo.require("config.json").parent
    for filename in OPTIONAL_FILES:
        repo.get(filename)
    check(folder)
    if not repo.get("tokenizer.json"):
        for filename in TOKENIZER_FILES[-1]:
            repo.require(filename)
    if not any(repo.get(filename) for filename in WEIGHT_FILES):
        raise ValueError(f"{name}: {constants.ENDPOINT} has no {' or '.join(WEIGHT_FILES)} for it")
    for path in weight_paths(folder):
        repo.require(path.name)
    # the version that is used offline; until here it was the previous one
    main = repo.folder / "refs" / "main"
    if not main.is_file() or main.read_bytes() != repo.commit.encode():
        try:
            main.parent.mkdir(exist_ok=True)
            write_text(main, repo.commit)
        except OSError:
            log.info("%s: the cache is read-only: offline, the previous version will be used", name)
    return folder


def download_prefix(name: str) -> Path:
    """The folder in the cache of the newest version of a prefix on the hub, with the files that a
    prefix may have. Offline, the version in the cache is used.

    Raises:
        OSError: the hub or the disk failed; says what to do.
        ValueError: nothing has this name, or it has no prefix.
    """
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError as error:
        raise ValueError(f"{name!r}: neither a file nor the name of a prefix on the hub") from error
    repo = _Repo(name, "main")
    for filename in ("adapter_config.json", "prefix.safetensors", "config.json"):
        try:
            newest: Any = repo.head(filename, "no file or folder of this name, and requesting")
        except hub_errors.EntryNotFoundError:
            continue
        except (OSError, ValueError):
            cached = find_cached(name, filename)
            if isinstance(cached, str):
                return Path(cached).parent
            raise
        repo = replace(repo, commit=newest.commit_hash)
        paths = [path for name in PREFIX_FILES if (path := repo.get(name)) is not None]
        return paths[0].parent
    raise ValueError(f"{name}: {constants.ENDPOINT} has no {' or '.join(PREFIX_FILES)} for it")


def _complete_in_cache(repo: _Repo) -> Path | None:
    """The folder of the version in the cache, if it is complete."""
    config = find_cached(repo.name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    weights = weight_paths(folder)
    forms = [[folder / name for name in names] for names in TOKENIZER_FILES]
    texts = next((form for form in forms if all(path.is_file() for path in form)), [])
    paths = [folder / "config.json", *texts, *weights]
    if not weights or not texts or not all(path.is_file() for path in paths):
        return None
    paths += [path for name in OPTIONAL_FILES if (path := folder / name).is_file()]
    for path in paths:
        repo.check(path)
    return folder
