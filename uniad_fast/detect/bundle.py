"""A trained detector on disk: a folder with `model.safetensors` and `config.json`, whole or not there."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..errors import UniadFastError
from ..files import atomic_directory, sha256_of_file
from ..printable import printable
from ..state_dicts import StateDict

FORMAT = "uniad_fast bundle"
VERSION = 4
_LONGEST_NAME = 180  # in bytes: file systems take 255, and temporary names are longer
_TENSORS, _CONFIG, _LOG = "model.safetensors", "config.json", "training.csv"


class BundleError(UniadFastError):
    """A folder that is no bundle, or a damaged one; the message says what is wrong."""


def write_bundle(directory: str | os.PathLike, tensors: StateDict, config: dict[str, Any], training_log: str) -> None:
    """Write a bundle, replacing one that is there; `training_log` goes into training.csv.

    Raises:
        BundleError: `directory` exists and is or holds something else, which is left alone.
        UniadFastError: a tensor is not finite.
    """
    directory = Path(directory)
    check_writable(directory)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UniadFastError(f"{name} is not finite: such a detector is of no use, and not saved")
    with atomic_directory(directory) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial / _TENSORS)
        content = {"format": FORMAT, "version": VERSION, "sha256": sha256_of_file(partial / _TENSORS), **config}
        content["config_sha256"] = _hash_of(content)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (partial / _CONFIG).write_text(text, encoding="utf-8")
        if training_log:
            (partial / _LOG).write_text(training_log, encoding="utf-8")


def check_writable(directory: str | os.PathLike) -> None:
    """BundleError if a bundle can't be put at `directory`: something else is there, or nothing can be renamed to it."""
    directory = Path(directory)
    if directory.is_symlink():
        raise BundleError(f"{directory} is a link: name the place itself for the bundle")
    if directory.is_dir():
        if os.path.ismount(directory):
            raise BundleError(f"{directory} is a mount point, which no folder can replace: name a folder in it")
        content = sorted(path.name for path in directory.iterdir())
        if content and not _is_bundle(directory):
            raise BundleError(f"{directory} is a folder with other content: choose another place for the bundle")
        if others := [name for name in content if name not in (_TENSORS, _CONFIG, _LOG)]:
            raise BundleError(
                f"{directory} is a bundle with other content ({printable(', '.join(others[:5]))}), lost with it: "
                "move that elsewhere first"
            )
    elif directory.exists():
        raise BundleError(f"{directory} is a file: choose another place for the bundle")
    elif len(os.fsencode(directory.name)) > _LONGEST_NAME:
        raise BundleError(f"{directory} has a name of {len(os.fsencode(directory.name))} bytes: choose a shorter one")


@contextlib.contextmanager
def read_bundle(directory: str | os.PathLike) -> Iterator[tuple[StateDict, dict[str, Any]]]:
    """Tensors and configuration of a bundle; their checksum is computed beside the block and verified at its end.

    The tensors lie in the file, mapped: whoever keeps them copies them. An error in the block is that of a damaged file
    where the file is damaged.

    Raises:
        BundleError: missing, not a bundle, of a newer version, or damaged.
    """
    directory = Path(directory)
    config = _read_config(directory)
    path = directory / _TENSORS
    with ThreadPoolExecutor(1) as pool:
        checksum = pool.submit(sha256_of_file, path)
        try:
            try:
                tensors = load_file(path)
            except Exception as error:  # safetensors raises kinds of its own
                raise BundleError(f"{path} can't be read: {printable(error)}") from None
            yield tensors, config
        finally:
            if checksum.result() != config.get("sha256"):
                raise BundleError(f"{path} is damaged: its checksum is not the one in {_CONFIG}") from None


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a folder: a bundle is the folder that `uniad-fast train -o` writes")
    for name in (_CONFIG, _TENSORS):
        if not (directory / name).is_file():
            raise BundleError(f"{directory} is not a bundle: it has no {name}")
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise BundleError(f"{directory / _CONFIG} is damaged: {reason}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(f"{directory / _CONFIG} is not the configuration of a bundle")
    if type(config.get("version")) is not int or config["version"] != VERSION:
        raise BundleError(
            f"{directory} is a bundle of version {config.get('version')!r}; this release reads version {VERSION}"
        )
    if config.pop("config_sha256", None) != _hash_of(config):
        raise BundleError(f"{directory / _CONFIG} is damaged or was edited: its checksum is not that of its content")
    return config


def read_log(directory: str | os.PathLike) -> str:
    """What a bundle's training.csv holds; nothing where it has none, or none that can be read."""
    try:
        return (Path(directory) / _LOG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _hash_of(config: dict[str, Any]) -> str:
    """Hex SHA-256 of a configuration, whatever the order of its names."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _is_bundle(directory: Path) -> bool:
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT
