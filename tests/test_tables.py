"""What the tables of studies say."""

import json
from dataclasses import replace

import pytest
import torch

from uniad_fast.studies.systems import PART_SYSTEMS, SHORTCUT_SYSTEMS, System, recipe_systems, switch_systems
from uniad_fast.studies.tables import final_table, shortcut_table, time_table
from uniad_fast.studies.trial import EVERY_CLASS
from uniad_fast.training.recipes import FAST


def row(system, seed, epoch, value, setting="unified", pixel=None, score="l2"):
    values = dict(image_auroc_max=value, image_auroc_mean=value / 2, pixel_auroc=pixel, loss=1 / epoch, seconds=epoch)
    return dict(system=system, setting=setting, seed=seed, epoch=epoch, score=score, **{"class": EVERY_CLASS}, **values)


def test_the_tables_say_what_was_measured():
    rows = [
        *(row("A", 0, e, v) for e, v in ((1, 0.6), (2, 0.9), (4, 0.7))),
        *(row("A", 1, e, v) for e, v in ((1, 0.8), (2, 0.7), (4, 0.6))),
        *(row("B", s, 4, v, pixel=0.5) for s, v in ((0, 0.8), (1, 0.8))),
    ]
    line = shortcut_table(rows[:6], ["A", "missing"]).splitlines()[2]
    # Best 0.9 and 0.8, last 0.7 and 0.6, fall 0.2 in both.
    assert line == "| A | unified | 0.2500 | 0.850 ± 0.071 | 0.650 ± 0.071 | 0.200 ± 0.000 |"
    rows = [r | {"pixel_auroc": 0.25 if r["system"] == "A" else 0.5} for r in rows]
    head, _, first, second = final_table(rows, ["A", "B"]).splitlines()
    assert head == "| system | loss | image AUROC, l2 | difference | pixel AUROC, l2 | difference | seconds |"
    assert first == "| A | 0.250 | 0.650 ± 0.071 |  | 0.250 ± 0.000 |  | 4 |"
    assert second == "| B | 0.250 | 0.800 ± 0.000 | +0.150 | 0.500 ± 0.000 | +0.250 | 4 |"


def test_the_time_table_says_when_the_papers_best_is_reached():
    rows = [
        *(row("paper", 0, e, v) for e, v in ((1, 0.5), (100, 0.8), (200, 0.75))),
        *(row("paper", 0, e, v, score="whitened") for e, v in ((1, 0.6), (200, 0.84))),
        *(row("fast", 0, e, v) for e, v in ((1, 0.5), (4, 0.7))),
        *(row("fast", 0, e, v, score="whitened") for e, v in ((1, 0.7), (2, 0.8), (4, 0.85))),
    ]
    assert time_table(rows).splitlines()[2:] == [
        "| paper, its best | 0 | l2 | 0.800 | 100 | 100 |  |  |  |  |",
        "| paper, its best | 0 | whitened | 0.840 | 200 | 200 |  |  |  |  |",
        "| fast, its end | 0 | l2 | 0.700 | 4 | 4 | not reached |  | not reached |  |",
        "| fast, its end | 0 | whitened | 0.850 | 4 | 4 | 2 s | 50 | 4 s | 50 |",
    ]


def test_every_system_is_what_its_name_says():
    grid, recipe = (8, 8), replace(FAST, epochs=1)
    systems = [*SHORTCUT_SYSTEMS, *PART_SYSTEMS, *switch_systems(grid), *recipe_systems(FAST)]
    for names in (SHORTCUT_SYSTEMS, (*PART_SYSTEMS, *switch_systems(grid)), recipe_systems(FAST)):
        identities = [json.dumps([s.network, s.options, s.changes], default=list, sort_keys=True) for s in names]
        assert len(set(identities)) == len({s.name for s in names}) == len(names)
    for system in systems:
        own = system.recipe(recipe)
        network = system.build(12, 16, grid, own)
        assert network.reconstruct(torch.randn(2, 64, 12)).shape == (2, 64, 12), system.name
        if system.network not in ("uniad", "transformer"):
            continue
        layers = network.transformer.decoder.layers
        attentions = [network.transformer.encoder.layers[0].self_attn, layers[0].self_attn, layers[0].multihead_attn]
        windows = [attention.neighbor_size for attention in attentions]
        if system.name in ("without NMA", "LQD alone", "FJ alone", "none of them"):
            assert windows == [None] * 3
        elif system.name == "mask in encoder":
            assert windows == [(4, 4), None, None]
        elif system.name.startswith("window"):
            assert windows == [tuple(map(int, system.name.split()[1].split("x")))] * 3
        blocks = [
            p for n, p in network.transformer.named_parameters() if n.endswith(("out_proj.weight", "linear2.weight"))
        ]
        assert len(blocks) == 4 * 2 + 4 * 3
        assert all((p == 0).all() == own.zero_blocks for p in blocks), system.name
        if "jitter" in system.name or "FJ" in system.name:
            assert (network.jitter_scale, network.jitter_prob) == (own.jitter_scale, own.jitter_prob)
    assert {s.name: s.recipe(recipe).jitter_prob for s in PART_SYSTEMS}["without FJ"] == 0.0
    with pytest.raises(ValueError, match="'gru'"):
        System("x", "gru").build(12, 16, grid, recipe)
