"""Packages that only studies need."""

from importlib.util import find_spec


class MissingPackageError(ValueError):
    """A package of the extra [study] is not installed."""


def require(*modules: str) -> None:
    """Raise `MissingPackageError` unless all of these can be imported."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"this needs {', '.join(missing)}: pip install 'uniad_fast[study]'")
