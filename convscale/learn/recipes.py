"""The named recipes as a table: one entry each, with its source, and the hardware, hours and result where these are
published.

Published recipes are for ImageNet-1k, and their batch is the global one: ``batch_size`` x processes x ``accumulate``.
"""

from __future__ import annotations

import os
from pathlib import Path

from convscale.errors import UserError, nearest
from convscale.learn.recipe import Recipe
from convscale.read import read_json, read_yaml

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="small",
            source=(
                "convscale's own, for training small images (28 to 64 px) from scratch in few epochs: one-cycle, Muon "
                "for the convolutions' kernels and AdamW for the rest (Jordan et al. 2024), shifts and flips, large "
                "batches"
            ),
            epochs=12,
            batch_size=256,
            optimizer="muon",
            lr=2e-2,
            momentum=0.6,
            beta2=0.99,
            weight_decay=0.05,
            schedule="onecycle",
            label_smoothing=0.1,
            augment="shift-crop",
            shift=0.07,
        ),
        Recipe(
            name="small-adamw",
            source=(
                "convscale's own, and its recipe small until 0.2: one-cycle AdamW, shifts and flips, averaged weights"
            ),
            epochs=10,
            batch_size=128,
            optimizer="adamw",
            lr=4e-3,
            beta2=0.99,
            weight_decay=0.05,
            schedule="onecycle",
            label_smoothing=0.1,
            augment="shift-crop",
            shift=0.07,
            ema_decay=0.998,
            ema_every=5,
        ),
        Recipe(
            name="small-long",
            source=(
                "convscale's own: the recipe small-adamw for four times as many epochs, with the cutout and the "
                "smoothing of weights that a longer run needs"
            ),
            epochs=40,
            batch_size=128,
            optimizer="adamw",
            lr=4e-3,
            beta2=0.99,
            weight_decay=0.05,
            schedule="onecycle",
            label_smoothing=0.1,
            augment="shift-crop",
            shift=0.07,
            cutout=0.28,
            ema_decay=0.9995,
            ema_every=5,
        ),
        Recipe(
            name="pictures",
            source=(
                "convscale's own, for training on a user's pictures from scratch: one-cycle AdamW, random crops, "
                "TrivialAugment, averaged weights"
            ),
            epochs=50,
            batch_size=64,
            optimizer="adamw",
            lr=2e-3,
            weight_decay=0.05,
            schedule="onecycle",
            label_smoothing=0.1,
            augment="resized-crop",
            crop_scale=0.25,
            policy="trivialaugment",
            ema_decay=0.998,
            clip_norm=5.0,
        ),
        Recipe(
            name="finetune",
            source=(
                "convscale's own, for pretrained weights on a user's pictures: the head first (solved on the features "
                "that are there: "
                "Kumar et al. 2022, arXiv 2202.10054), then all layers, lower ones slower (layer-wise decay: Clark et "
                "al. 2020, ELECTRA)"
            ),
            epochs=20,
            batch_size=32,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            layer_decay=0.85,
            solve_head=True,
            join_start=True,
            keep_statistics=True,
            schedule="cosine",
            warmup_epochs=1,
            label_smoothing=0.1,
            augment="resized-crop",
            crop_scale=0.35,
            drop_rate=0.2,
            ema_decay=0.998,
            clip_norm=5.0,
        ),
        Recipe(
            name="tresnet",
            source=(
                "TResNet (Ridnik et al. 2020, arXiv 2003.13630, section 4.1): 300 epochs, one-cycle, AutoAugment, "
                "cutout, label"
                " smoothing, true weight decay, mixed precision; TResNet-M 80.8 % top-1. Optimiser, learning rate and "
                "batch are"
                " not published: these are the public timm recipe's for the same network. 730 images/s on a V100 "
                "(table 2) "
                "would be 146 GPU hours for 300 epochs"
            ),
            epochs=300,
            batch_size=190,
            optimizer="sgd",
            lr=0.6,
            weight_decay=1e-4,
            schedule="onecycle",
            label_smoothing=0.1,
            augment="resized-crop",
            policy="autoaugment",
            cutout=0.5,
            precision="amp",
        ),
        Recipe(
            name="tresnet-timm",
            source=(
                "A public timm recipe for TResNet-M on 8 GPUs x 190 images: 80.5 % top-1; rand-m9 (of 10) stands here "
                "as RandAugment 2 x 27 (of 30)"
            ),
            epochs=300,
            batch_size=190,
            optimizer="sgd",
            lr=0.6,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_epochs=5,
            start_factor=0.001,
            label_smoothing=0.1,
            augment="resized-crop",
            policy="randaugment",
            policy_magnitude=27,
            erase=0.4,
            mixup=0.2,
            ema_decay=0.9999,
            precision="amp",
        ),
        Recipe(
            name="efficientnet",
            source=(
                "EfficientNet (Tan and Le 2019, arXiv 1905.11946, section 5.2): RMSProp 0.9/0.9, lr 0.256 x 0.97 every "
                "2.4 "
                "epochs, AutoAugment, stochastic depth 0.8, dropout 0.2 (B0) to 0.5 (B7); B0 77.1 %. From the authors' "
                "TensorFlow code, as far as known: batch 4096, 350 epochs, 5 of them warm-up, averaged weights. Batch "
                "norm's "
                "momentum 0.99 is the network's"
            ),
            epochs=350,
            batch_size=128,
            accumulate=32,
            optimizer="rmsprop",
            lr=0.256,
            momentum=0.9,
            beta2=0.9,
            epsilon=1e-3,
            weight_decay=1e-5,
            schedule="exponential",
            warmup_epochs=5,
            start_factor=0.001,
            decay_rate=0.97,
            decay_epochs=2.4,
            label_smoothing=0.1,
            augment="resized-crop",
            policy="autoaugment",
            drop_rate=0.2,
            drop_path_rate=0.2,
            ema_decay=0.9999,
            precision="amp",
        ),
        Recipe(
            name="rsb-a2",
            source=(
                "ResNet strikes back (Wightman, Touvron, Jegou 2021, arXiv 2110.00476), procedure A2: ResNet-50 79.8 % "
                "after "
                "300 epochs, batch 2048; without its repeated augmentation; RandAugment 7 (of 10) is 21 (of 30) here"
            ),
            epochs=300,
            batch_size=512,
            accumulate=4,
            optimizer="lamb",
            lr=5e-3,
            epsilon=1e-6,
            weight_decay=0.02,
            schedule="cosine",
            warmup_epochs=5,
            start_factor=0.001,
            loss="bce",
            label_smoothing=0.0,
            augment="resized-crop",
            policy="randaugment",
            policy_magnitude=21,
            mixup=0.1,
            cutmix=1.0,
            drop_path_rate=0.05,
            precision="amp",
        ),
        Recipe(
            name="rsb-a3",
            source=(
                "ResNet strikes back (Wightman, Touvron, Jegou 2021, arXiv 2110.00476), procedure A3: ResNet-50 78.1 % "
                "after "
                "100 epochs at 160 px, batch 2048; RandAugment 6 (of 10) is 18 (of 30) here"
            ),
            epochs=100,
            batch_size=512,
            accumulate=4,
            image_size=160,
            optimizer="lamb",
            lr=8e-3,
            epsilon=1e-6,
            weight_decay=0.02,
            schedule="cosine",
            warmup_epochs=5,
            start_factor=0.001,
            loss="bce",
            label_smoothing=0.0,
            augment="resized-crop",
            policy="randaugment",
            policy_magnitude=18,
            mixup=0.1,
            cutmix=1.0,
            precision="amp",
        ),
        Recipe(
            name="detect-1x",
            source=(
                "The 1x schedule of Detectron (Girshick et al. 2018) and mmdetection on COCO train2017: 12 epochs of "
                "SGD at batch 16 and lr 0.02 (0.01 for FCOS, Tian et al. 2019, arXiv 1904.01355, section 4), a tenth "
                "after epochs 8 and 11, 500 steps of warm-up, flips alone; FCOS with ResNet-50 about 39 mAP at 800 px. "
                "Published with 8 GPUs; weight decay is decoupled here. Not run by us on COCO"
            ),
            epochs=12,
            batch_size=16,
            optimizer="sgd",
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="multistep",
            decay_rate=0.1,
            decay_at="8,11",
            warmup_epochs=0.07,
            start_factor=0.001,
            label_smoothing=0.0,
            augment="none",
            flip=0.5,
            precision="amp",
        ),
        Recipe(
            name="detect-small",
            source=(
                "convscale's own, for boxes in a user's pictures, from scratch or from a pretrained backbone: "
                "one-cycle AdamW, large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177) between half and one and a "
                "half times, flips, averaged weights"
            ),
            epochs=30,
            batch_size=16,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            schedule="onecycle",
            label_smoothing=0.0,
            augment="scale-jitter",
            scale_low=0.5,
            scale_high=1.5,
            flip=0.5,
            ema_decay=0.998,
            clip_norm=10.0,
        ),
        Recipe(
            name="multilabel",
            source=(
                "Asymmetric loss (Ridnik et al. 2021, arXiv 2009.14119) with the settings of its section 4: Adam, "
                "one-cycle up "
                "to 2e-4, RandAugment, cutout, averaged weights; TResNet-L 86.6 mAP on MS-COCO at 448 px"
            ),
            epochs=40,
            batch_size=56,
            optimizer="adamw",
            lr=2e-4,
            weight_decay=1e-4,
            schedule="onecycle",
            loss="asymmetric",
            label_smoothing=0.0,
            augment="resized-crop",
            crop_scale=0.5,
            policy="randaugment",
            cutout=0.5,
            ema_decay=0.9997,
            precision="amp",
        ),
        Recipe(
            name="coco-asl",
            source=(
                "Asymmetric loss (Ridnik et al. 2021, arXiv 2009.14119), the authors' training script for MS-COCO: "
                "Adam 1e-4 with true weight decay, an 80-epoch one-cycle (20 % up) stopped at 40, batch 128, 448 px, "
                "RandAugment, cutout, averaged weights, no gradient through the focusing weights; TResNet-L 86.6 mAP, "
                "TResNet-M at 224 px from ImageNet-21k 81.8. They squish images to a square; here crops of at least "
                "three quarters of the picture are taken"
            ),
            epochs=40,
            schedule_epochs=80,
            batch_size=128,
            image_size=448,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=1e-4,
            schedule="onecycle",
            warmup_epochs=16,
            loss="asymmetric",
            asymmetric_detach=True,
            label_smoothing=0.0,
            augment="resized-crop",
            crop_scale=0.75,
            policy="randaugment",
            cutout=0.5,
            ema_decay=0.9997,
            precision="amp",
        ),
        Recipe(
            name="ml-decoder",
            source=(
                "ML-Decoder (Ridnik et al. 2021, arXiv 2111.12933): the head in the place of the pool, trained as "
                "coco-asl with batch 56 at 448 px; on MS-COCO TResNet-M at 224 px 84.2 mAP, TResNet-L at 448 px 90.0, "
                "from ImageNet-1k weights about 79 with M (a user's)"
            ),
            head="ml_decoder",
            epochs=40,
            schedule_epochs=80,
            batch_size=56,
            image_size=448,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=1e-4,
            schedule="onecycle",
            warmup_epochs=16,
            loss="asymmetric",
            asymmetric_detach=True,
            label_smoothing=0.0,
            augment="resized-crop",
            crop_scale=0.75,
            policy="randaugment",
            cutout=0.5,
            ema_decay=0.9997,
            precision="amp",
        ),
        Recipe(
            name="usi",
            source=(
                "USI (Ridnik et al. 2022, arXiv 2204.03475): any network by one recipe with a teacher, cross-entropy "
                "plus 5 times its divergence at temperature 1; AdamW 2e-3, cosine over 300 epochs, 8 x 128 images, "
                "mixup 0.8, cutmix 1; with TResNet-L-v2 (83.9 %) as teacher TResNet-M 82.5 %, ResNet-50 81.0 %, "
                "MobileNetV3-L 77.3 %. RandAugment 7 (of 10) is 21 (of 30) here; without its repeated augmentation"
            ),
            epochs=300,
            batch_size=128,
            accumulate=8,
            optimizer="adamw",
            lr=2e-3,
            weight_decay=0.02,
            schedule="cosine",
            warmup_epochs=5,
            start_factor=0.05,
            final_factor=5e-4,
            label_smoothing=0.0,
            distill_kl=5.0,
            distill_temperature=1.0,
            augment="resized-crop",
            policy="randaugment",
            policy_magnitude=21,
            mixup=0.8,
            cutmix=1.0,
            ema_decay=0.99996,
            precision="amp",
        ),
    )
}
"""Name -> recipe."""


def get_recipe(recipe: str | os.PathLike[str] | Recipe) -> Recipe:
    """A recipe by name, from a YAML or JSON file, or the one given.

    Raises:
        UserError: an unknown name (with the nearest), an unreadable file, an unknown key.
    """
    from convscale.learn.recipes import RECIPES

    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in RECIPES:
        return RECIPES[str(recipe)]
    path = Path(recipe)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UserError(
            f"recipe {str(recipe)!r} is unknown{nearest(str(recipe), RECIPES)}; a file must end in .yaml or .json"
        )
    values = (read_json if path.suffix.lower() == ".json" else read_yaml)(path, "recipe")
    try:
        return Recipe.from_dict(values)
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error


def recipe_of(recipe: Recipe | str | os.PathLike[str] | None, resumed: str | os.PathLike[str] | None) -> Recipe | None:
    """What was asked for; else the one that a resumed run wrote into its folder; None: there is none."""
    if recipe is None and resumed is not None and (Path(resumed) / "recipe.yaml").is_file():
        return get_recipe(Path(resumed) / "recipe.yaml")
    return None if recipe is None else get_recipe(recipe)


def list_recipes() -> list[str]:
    """Names of all recipes."""
    from convscale.learn.recipes import RECIPES

    return sorted(RECIPES)
