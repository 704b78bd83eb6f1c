"""What training costs an image, three ways, in turns within one run.

python -m bench.reports.pace [--threads N] [--image-size S] [--backbone NAME] [--rounds N] [--smoke]

    public  as the public code trains: features extracted anew, the mask rebuilt, nn.MultiheadAttention, float32
    paper   the recipe `paper` on cached features, by our kernels
    fast    the recipe `fast` on cached features, by our kernels

Times the images that a recipe takes to a quality (`uniad-fast study time`), that is the time to it. Reading and
resizing images, which the public way does in each epoch too, is not in its figure; its backbone runs as fast as ours.
"""

import argparse

import timm
import torch
from torch import Tensor, nn

from bench.tools.timing import interleaved
from bench.tools.turns import Work
from uniad_fast.models.backbone import Backbone
from uniad_fast.models.precision import autocast, computes_in_bfloat16
from uniad_fast.testing import PublicUniAD
from uniad_fast.training.build import build_model
from uniad_fast.training.loop import optimization
from uniad_fast.training.recipes import FAST, PAPER, Recipe

CPU = torch.device("cpu")
LEVELS = (0, 1, 2, 3)


def training_step(model: nn.Module, recipe: Recipe, reconstruct: Work) -> Work:
    """One step on what `reconstruct` gives: (reconstruction, target)."""
    optimizers = optimization.optimizers(model, recipe)
    loss_of = optimization.loss(recipe)

    def step() -> None:
        with autocast(recipe.precision, CPU):
            reconstruction, target = reconstruct()  # type: ignore[misc]
        model.zero_grad(set_to_none=True)
        loss_of(reconstruction.float(), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()

    return step


def ours(backbone: Backbone, image_size: int, recipe: Recipe) -> Work:
    grid = backbone.feature_size(image_size)
    model = build_model(backbone.channels, backbone.stride, grid, recipe).train()
    tokens = torch.randn(recipe.batch_size, grid[0] * grid[1], backbone.channels)
    return training_step(model, recipe, lambda: (model.reconstruct(tokens), tokens))


def public(backbone: Backbone, image_size: int) -> Work:
    grid = backbone.feature_size(image_size)
    window = (grid[0] // 2, grid[1] // 2)
    model = PublicUniAD(backbone.channels, backbone.stride, grid, window).train()
    images = torch.rand(PAPER.batch_size, 3, image_size, image_size)

    def reconstruct() -> tuple[Tensor, Tensor]:
        feature = backbone(images)
        return model({"feature_align": feature})["feature_rec"], feature

    return training_step(model, PAPER, reconstruct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="timm model; its weights are random here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="small images, one round: only to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, rounds = (64, 1) if options.smoke else (options.image_size, options.rounds)
    features = timm.create_model(options.backbone, features_only=True, out_indices=LEVELS)
    backbone = Backbone(options.backbone, features, LEVELS)
    works = {
        "public": public(backbone, size),
        "paper": ours(backbone, size, PAPER),
        "fast": ours(backbone, size, FAST),
    }
    times = interleaved(works, rounds)
    height, width = backbone.feature_size(size)
    print(
        f"{options.backbone} at {size} x {size}, {height} x {width} tokens of {backbone.channels}; {options.threads} "
        f"threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, medians of {rounds}"
    )
    per_image = {n: s / (FAST if n == "fast" else PAPER).batch_size for n, s in times.items()}
    for name, seconds in per_image.items():
        recipe = FAST if name == "fast" else PAPER
        dtype = "bfloat16" if computes_in_bfloat16(recipe.precision, CPU) else "float32"
        print(
            f"  {name:8} batch {recipe.batch_size:2}, {dtype:8}, dropout {recipe.dropout}: "
            f"{seconds * 1e3:7.2f} ms an image, {seconds / per_image['fast']:5.2f} x fast"
        )


if __name__ == "__main__":
    main()
