"""Packages that only some commands need, brought by an extra each."""

from importlib.util import find_spec

from .errors import UniadFastError

_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "prometheus_client": "prometheus-client"}
_PACKAGES |= {"multipart": "python-multipart"}


class MissingPackageError(UniadFastError):
    """A package of an extra is not installed."""


def require(*modules: str) -> None:
    """Raise `MissingPackageError` unless all of these can be imported."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        packages = [_PACKAGES.get(name, name) for name in missing]
        raise MissingPackageError(f"this needs {', '.join(missing)}: pip install {' '.join(packages)}")
