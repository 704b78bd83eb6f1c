"""What remembering reaches on the same features: the distance to the nearest token of good training images.

python -m bench.reports.nearest_neighbors DATA [--image-size S] [--backbone NAME] [--backbone-weights FILE] [--tokens N]

A yardstick for the quality of a reconstruction, not a way to work: every token that is scored is compared with all that
are remembered, here a random part of them.
"""

import argparse

import numpy as np
import torch

from uniad_fast.data.datasets import load_dataset
from uniad_fast.detect.metrics import detection_metrics
from uniad_fast.detect.pipeline import to_maps
from uniad_fast.detect.residual_score import IMAGE_SCORES, image_scores
from uniad_fast.models.backbone import Backbone
from uniad_fast.studies.data import StudyData

_IMAGES_AT_A_TIME = 16


def distances(tokens: torch.Tensor, remembered: torch.Tensor) -> torch.Tensor:
    """[B, N, C], [M, C] -> L2 distance to the nearest, [B, N]."""
    squares = remembered.square().sum(dim=1)
    parts = []
    for batch in tokens.split(_IMAGES_AT_A_TIME):
        flat = batch.flatten(0, 1)
        nearest = torch.addmm(squares, flat, remembered.T, alpha=-2).amin(dim=1) + flat.square().sum(dim=1)
        parts.append(nearest.clamp_min(0).sqrt().view(batch.shape[:2]))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set, as for uniad-fast")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--backbone-weights")
    parser.add_argument("--tokens", type=int, default=20_000, help="how many are remembered")
    options = parser.parse_args()
    size = options.image_size
    backbone = Backbone.pretrained(options.backbone, size, options.backbone_weights)
    data = StudyData.load(load_dataset(options.data), backbone, size, None)
    every = torch.from_numpy(np.array(data.train_tokens)).flatten(0, 1)
    tokens = torch.from_numpy(np.array(data.test_tokens))
    picked = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: options.tokens]
    grid = backbone.feature_size(size)
    print(f"{data.name}, {options.backbone} at {size} x {size}, {len(picked)} tokens remembered of {len(every)}")
    for name, channels in (("all stages", slice(None)), ("deepest stage", backbone.deepest)):
        found = distances(tokens[..., channels].contiguous(), every[picked][:, channels].contiguous()).unflatten(
            1, grid
        )
        for kind in IMAGE_SCORES:
            aurocs = []
            for class_name in data.classes:
                rows = [i for i, sample in enumerate(data.test) if sample.class_name == class_name]
                scores = image_scores(to_maps(found[rows], size), kind)
                labels = [data.test[i].defective for i in rows]
                aurocs.append(detection_metrics(scores.numpy(), labels).values["auroc"])
            by_class = ", ".join(f"{c} {a:.3f}" for c, a in zip(data.classes, aurocs, strict=True))
            print(f"  {name:13} {kind:4}  mean {np.mean(aurocs):.3f}  ({by_class})", flush=True)


if __name__ == "__main__":
    main()
