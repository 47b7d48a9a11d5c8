"""unet-ray import."""

from __future__ import annotations

import shlex

import click

from unet_ray.cli.messages import print_next, print_places
from unet_ray.cli.options import OUTPUT, Command, numbers, option
from unet_ray.config import UserError

MODEL = "About the model"


@click.command("import", cls=Command, short_help="Make a model directory from milesial/Pytorch-UNet's weights.")
@click.argument("checkpoint", metavar="CHECKPOINT.pth")
@option(
    MODEL,
    "--image-size",
    required=True,
    metavar="N|HEIGHT,WIDTH",
    help="Size that images are resized to: their own size times milesial's --scale.",
)
@option(
    MODEL, "--mask-values", metavar="LIST", help="Stored value of each class, e.g. 0,255.", shown="as in the checkpoint"
)
@option(MODEL, "--classes", metavar="LIST", help="Names of the classes, with commas.", shown="background,foreground")
@option(OUTPUT, "--out", required=True, metavar="MODEL", help="Model directory to write.")
def import_weights(checkpoint: str, out: str, image_size: str, mask_values: str | None, classes: str | None) -> None:
    """Make a model directory from weights of milesial/Pytorch-UNet, for predict and for train --init.

    It reads only the weights and runs no code of the file. Widths, channels and classes are read from the shapes. For
    images whose sides are multiples of 16, the output equals milesial's to rounding. milesial pads other sizes with
    zeros; this package repeats the edge. Checkpoints trained with --bilinear have another architecture and are refused.

    \b
    Example:
      unet-ray import checkpoint_epoch5.pth --out MODEL --image-size 640,960

    \b
    Coming from milesial/Pytorch-UNet (masks of 0 and 255 are read as background and foreground):
      train.py --epochs 5 --batch-size 4 --scale 0.5 --amp
          unet-ray train --images data/imgs --masks data/masks --out RUN --epochs 5 --batch-size 4
              --set data.image_size='[640, 960]' --set model.norm=batch
      train.py --validation 10     --set data.val_fraction=0.1, with --group-by where images belong together
      train.py --load FILE.pth     unet-ray import FILE.pth --out MODEL …, then unet-ray train --init MODEL …
      predict.py -i a.jpg -o a.png unet-ray predict RUN a.jpg --out MASKS
      predict.py --mask-threshold 0.3
                                   unet-ray predict … --threshold 0.3; evaluate RUN --choose-threshold finds the best
      predict.py --scale           is in the model: no flag is repeated
      wandb                        RUN/tensorboard, MLflow (--set compute.mlflow=URI), report.html

    \b
    Coming from nnU-Net (a mask has its image's name: rename case_0000.png to case.png):
      nnUNetv2_plan_and_preprocess --verify_dataset_integrity
                                   unet-ray doctor; nothing is preprocessed (--cache DIR keeps resized images)
      channels of NIfTI volumes    unet-ray slices writes them as the channels of one image
      dataset.json with labels     --set model.num_classes=K --set data.classes='[background, …]'
      nnUNetv2_train D 2d 0 … 4    unet-ray train --folds 5
      nnUNetv2_predict             unet-ray predict RUN IN --out OUT --tile 512 --tta
      nnUNetv2_evaluate_folder     unet-ray evaluate RUN --images IN --masks LABELS
      find_best_configuration      unet-ray evaluate RUN --choose-cleanup

    Volumes are segmented slice by slice: for 3-D networks nnU-Net remains the right tool.

    \b
    Coming from a notebook:
      the training loop            unet_ray.train(…) in Python
      Dataset and transforms       the settings data. and augment., applied to image and mask together
      torch.save(state_dict)       the model directory
      the cell that draws images   report.html
    """
    size = numbers(image_size, "--image-size", "640 or 640,960")
    if len(size) not in (1, 2):
        raise UserError(f"--image-size {image_size}: one number, or height and width")
    from unet_ray.models.milesial import import_milesial

    card = import_milesial(
        checkpoint,
        out,
        image_size=size[0] if len(size) == 1 else (size[0], size[1]),
        mask_values=None if mask_values is None else numbers(mask_values, "--mask-values", "0,255"),
        classes=None if classes is None else [name.strip() for name in classes.split(",")],
    )
    model = card.model
    click.echo(
        f"U-Net of {model.base_channels} channels, {model.depth} levels, {model.in_channels} channels in, classes "
        + ", ".join(card.classes)
    )
    print_places(model=out)
    print_next(
        f"unet-ray predict {shlex.quote(out)} FOLDER --out MASKS",
        f"unet-ray train --images DIR --masks DIR --out RUN --init {shlex.quote(out)}",
    )
