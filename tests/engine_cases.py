"""A detector with engines measured once, for the tests of both files."""

import pytest

from uniad_fast import AnomalyDetector
from uniad_fast.deploy import engine_files
from uniad_fast.deploy.examine import examine
from uniad_fast.deploy.plans import Plan

TORCH = Plan("torch", "features", "float32")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def detector(bundle, monkeypatch, cache):
    monkeypatch.setattr(engine_files, "default_cache_dir", lambda: cache)
    return AnomalyDetector.load(bundle)


@pytest.fixture(scope="module")
def paths(made_up_classes):
    return sorted(made_up_classes.glob("*/test/*/*.png"))


@pytest.fixture(scope="module")
def examined(bundle, paths, cache):
    """All plans of this machine at two batch sizes, measured once and remembered in `cache`."""
    return examine(AnomalyDetector.load(bundle), paths, [1, 3], cache_dir=cache, quiet=True)
