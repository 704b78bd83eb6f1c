"""What is kept of engines on a machine: checked before it is used, of one detector each, and never in the way."""

import dataclasses
import json
import os

import numpy as np
import torch
from engine_cases import TORCH, cache, detector, examined, paths  # noqa: F401  fixtures

from uniad_fast import AnomalyDetector
from uniad_fast.cli.engines import remembered
from uniad_fast.data.feature_cache import CacheError
from uniad_fast.deploy import engine_files
from uniad_fast.deploy.engine_files import EngineFiles
from uniad_fast.deploy.engines import use_engine
from uniad_fast.deploy.examine import examine


def test_what_is_kept_is_checked_before_it_is_used(detector, examined):
    files = EngineFiles(detector)
    graph = files.graph("features")
    whole = graph.read_bytes()
    graph.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert files.graph("features").read_bytes() == whole or EngineFiles(detector)._is_whole(graph)
    table = files._table_file()
    kept = table.read_text()
    for text in (
        '{"rows": [{"engine": []}]}',
        "",
        "[]",
        '{"rows": 3}',
        '{"rows": [3]}',
        '{"rows": [{"engine": "torch"}]}',
        "[" * 100_000,
    ):
        table.write_text(text)
        assert use_engine(detector, batch=3, count=500).plan == TORCH
        assert "engines" in "".join(remembered())
    table.write_text(kept)
    moved = json.loads(kept)["machine"]
    assert moved["threads"] == torch.get_num_threads() and moved["openvino"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert files.table() == []  # measured with other threads
    finally:
        torch.set_num_threads(before)


def test_only_the_last_detectors_are_kept(tmp_path):
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (number, number))
        engine_files._forget_oldest(tmp_path, tmp_path / str(number))
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(2, 10)}


def test_what_leaves_no_trace_in_the_tensors_has_files_of_its_own(detector):
    before = EngineFiles(detector).folder
    detector.pipeline.backbone.padded_for = 80
    padded = EngineFiles(detector).folder
    architecture = dataclasses.replace(detector.settings.architecture, nhead=1)
    detector.settings = dataclasses.replace(detector.settings, architecture=architecture)
    assert len({before, padded, EngineFiles(detector).folder}) == 3
    detector.pipeline.backbone.padded_for = None
    detector.settings = AnomalyDetector.of(detector.trained).settings
    detector.look_at(np.ones((64, 64), bool))
    assert EngineFiles(detector).folder == before  # no engine sees where the detector looks


def test_a_place_that_nothing_can_be_kept_in_costs_no_score(detector, paths, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    rows = examine(detector, paths, [1], cache_dir=tmp_path / "file", quiet=True, plans=[TORCH])
    assert [row.problem for row in rows] == [""]

    def homeless():
        raise CacheError("there is no home")

    monkeypatch.setattr(engine_files, "default_cache_dir", homeless)
    assert use_engine(detector, count=3).plan is None and use_engine(detector, count=500).plan == TORCH
    assert remembered() == ["engines: none measured here yet; uniad-fast engines BUNDLE IMAGES does"]
