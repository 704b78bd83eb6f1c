"""Which images a step trains on: all of them, each once, in parts that fit together, read ahead in order."""

import signal

import numpy as np
import pytest
import torch

from uniad_fast import signals
from uniad_fast.rows import row_numbers
from uniad_fast.training import batches, device_batches
from uniad_fast.training.batches import Batches, share
from uniad_fast.training.device_batches import DeviceBatches, uploaded

TOKENS = np.arange(50 * 2 * 3, dtype=np.float32).reshape(50, 2, 3)


class Recorded:
    """Rows that note what is asked of them, and when they are waited for."""

    def __init__(self, tokens):
        self.tokens, self.shape, self.begun, self.waited = tokens, tokens.shape, [], 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return self.tokens[rows]

    def begin_reading(self, rows):
        self.begun.append(rows)

        def wait():
            self.waited += 1
            return self.tokens[rows]

        return wait


def test_an_epoch_has_every_image_once_and_its_own_order():
    found = Batches(TOKENS, 8, seed=3)
    assert found.steps_per_epoch == 6 and not found.in_blocks
    epochs = [np.concatenate([found.rows(step) for step in range(first, first + 6)]) for first in (0, 6)]
    for rows in epochs:
        assert len(set(rows.tolist())) == 48
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(found.rows(2), Batches(TOKENS, 8, seed=3).rows(2))  # whatever was asked before
    assert not np.array_equal(found.rows(2), Batches(TOKENS, 8, seed=4).rows(2))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_are_the_batch(count):
    whole = [Batches(TOKENS, 7, seed=1).at(step) for step in range(3)]
    parts = [Batches(TOKENS, 7, seed=1, part=(rank, count)) for rank in range(count)]
    for step, batch in enumerate(whole):
        own = [part.at(step) for part in parts]
        assert torch.equal(torch.cat([one.tokens for one in own]), batch.tokens)
        for one in own:
            np.testing.assert_array_equal(one.rows, batch.rows)
            np.testing.assert_array_equal(one.tokens, TOKENS[batch.rows[one.first : one.first + len(one.tokens)]])
        assert max(len(one.tokens) for one in own) - min(len(one.tokens) for one in own) <= 1


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("resident", [True, False])
def test_batches_on_a_device_are_the_batches(resident, monkeypatch):
    monkeypatch.setattr(device_batches, "_resident", uploaded if resident else lambda *_: None)
    monkeypatch.setattr(device_batches, "_UPLOADED_AT_A_TIME", 4 * TOKENS[0].nbytes)
    for part in ((0, 1), (1, 3)):
        ours = DeviceBatches(Batches(TOKENS, 7, seed=1, part=part), DEVICE, 9)
        theirs = Batches(TOKENS, 7, seed=1, part=part)
        assert ours.are_resident == resident
        for step in (*range(9), 2):
            own, plain = ours.at(step), theirs.at(step)
            assert own.tokens.device.type == DEVICE.type and torch.equal(own.tokens.cpu(), plain.tokens)
            assert own.first == plain.first and np.array_equal(own.rows, plain.rows)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("share_of_memory", "resident"), [(0.4, True), (0.0, False)])
def test_features_are_on_a_gpu_where_they_fit(share_of_memory, resident, monkeypatch):
    monkeypatch.setattr(device_batches, "_SHARE", share_of_memory)
    assert DeviceBatches(Batches(TOKENS, 7, seed=1), DEVICE, 9).are_resident == resident


def test_an_upload_ends_where_a_signal_asked_for_it(monkeypatch):
    monkeypatch.setattr(signals, "_asked", [signal.SIGTERM])
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM"):
        uploaded(TOKENS, DEVICE)


def test_features_are_read_ahead_and_once(monkeypatch):
    monkeypatch.setattr(batches, "_AHEAD_BYTES", 3 * 8 * 2 * 3 * 4)  # three steps
    rows = Recorded(TOKENS)
    found = Batches(rows, 8, seed=0)
    for step in range(7):
        np.testing.assert_array_equal(found.at(step).tokens, TOKENS[found.rows(step)])
        assert (len(rows.begun), rows.waited) == (step // 3 + 2, step // 3 + 1)
    # A run that goes on begins anywhere.
    np.testing.assert_array_equal(Batches(rows, 8, seed=0).at(5).tokens, TOKENS[found.rows(5)])


def test_many_features_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr(batches, "IN_BLOCKS_ABOVE", 100)
    monkeypatch.setattr(batches, "_BLOCK", 4)
    monkeypatch.setattr(batches, "_GROUP_BYTES", 3 * 4 * 2 * 3 * 4)  # three blocks
    rows = Recorded(TOKENS[:48])
    found = Batches(rows, 6, seed=0)
    assert found.in_blocks
    epoch = np.concatenate([found.rows(step) for step in range(found.steps_per_epoch)])
    assert len(set(epoch.tolist())) == len(epoch) == 48
    for step in range(4):
        np.testing.assert_array_equal(found.at(step).tokens, TOKENS[found.rows(step)])
    for asked in rows.begun:  # two steps of six are three blocks of four, which lie anywhere
        assert len(set((asked // 4).tolist())) == 3
    assert not Batches(rows, 6, seed=0, classes=np.zeros(48, int)).in_blocks


def test_balanced_classes_are_met_equally_often():
    classes = np.array([0] * 40 + [1] * 9 + [2])
    found = Batches(TOKENS, 10, seed=0, classes=classes)
    met = classes[np.concatenate([found.rows(step) for step in range(5)])]
    assert sorted(np.bincount(met).tolist()) == [16, 17, 17]
    counts = np.bincount(np.concatenate([found.rows(step) for step in range(5)]), minlength=50)
    assert counts[:40].max() == 1 and set(counts[40:49]) <= {1, 2} and counts[49] >= 16


def test_shares_are_everything():
    for count in (0, 1, 7, 16):
        for parts in (1, 2, 3, 8):
            spans = [share(count, (number, parts)) for number in range(parts)]
            assert spans[0][0] == 0 and spans[-1][1] == count
            assert all(one[1] == next[0] for one, next in zip(spans, spans[1:], strict=False))


def test_rows_that_are_none():
    with pytest.raises(IndexError, match="rows are numbers"):
        row_numbers(np.array(["a"]), 3)
    assert row_numbers(slice(None), 3).tolist() == [0, 1, 2]
