"""A trained detector on disk: a folder with `model.safetensors` and `config.json`, whole or not there."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from .files import atomic_directory, sha256_of_file
from .state_dicts import StateDict

FORMAT = "uniad_fast bundle"
VERSION = 1
_TENSORS, _CONFIG = "model.safetensors", "config.json"


class BundleError(ValueError):
    """A folder that is no bundle, or a damaged one; the message says what is wrong."""


def write_bundle(directory: str | os.PathLike, tensors: StateDict, config: dict[str, Any], training_log: str) -> None:
    """Write a bundle, replacing one that is there; `training_log` goes into training.csv.

    Raises:
        BundleError: `directory` exists and is something else, which is left alone.
    """
    directory = Path(directory)
    check_writable(directory)
    with atomic_directory(directory) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial / _TENSORS)
        content = {"format": FORMAT, "version": VERSION, "sha256": sha256_of_file(partial / _TENSORS), **config}
        (partial / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if training_log:
            (partial / "training.csv").write_text(training_log, encoding="utf-8")


def check_writable(directory: str | os.PathLike) -> None:
    """BundleError if `directory` holds something that is not a bundle and must not be replaced."""
    directory = Path(directory)
    if directory.is_dir():
        if any(directory.iterdir()) and not _is_bundle(directory):
            raise BundleError(f"{directory} is a folder with other content: choose another place for the bundle")
    elif directory.exists():
        raise BundleError(f"{directory} is a file: choose another place for the bundle")


def read_bundle(directory: str | os.PathLike) -> tuple[StateDict, dict[str, Any]]:
    """Tensors and configuration of a bundle, its checksum verified.

    Raises:
        BundleError: missing, not a bundle, of a newer version, or damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a folder: a bundle is the folder that `uniad-fast train -o` writes")
    for name in (_CONFIG, _TENSORS):
        if not (directory / name).is_file():
            raise BundleError(f"{directory} is not a bundle: it has no {name}")
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{directory / _CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(f"{directory / _CONFIG} is not the configuration of a bundle")
    if config.get("version") != VERSION:
        raise BundleError(
            f"{directory} is a bundle of version {config.get('version')}; this release reads version {VERSION}"
        )
    if sha256_of_file(directory / _TENSORS) != config.get("sha256"):
        raise BundleError(f"{directory / _TENSORS} is damaged: its checksum is not the one in {_CONFIG}")
    return load_file(directory / _TENSORS), config


def _is_bundle(directory: Path) -> bool:
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT
