"""Defines networks to compare the U-Net with; the same code trains and scores them.

Legend: N images, C channels, K classes (1: a single logit), H, W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unet_ray.config import ModelConfig, UserError
from unet_ray.models.base import SegmentationModel

GRAY_LEVELS = 256


class Torchvision(SegmentationModel):
    """torchvision's FCN (Long et al. 2015) or DeepLabV3 (Chen et al. 2017), on a ResNet-50 with output stride 8 and
    without auxiliary heads."""

    def __init__(self, config: ModelConfig) -> None:
        from torchvision.models import ResNet50_Weights
        from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

        super().__init__(config, multiple_of=8)
        make = {"fcn": fcn_resnet50, "deeplabv3": deeplabv3_resnet50}[config.name]
        weights = ResNet50_Weights.IMAGENET1K_V2 if config.pretrained else None
        self.network = make(weights=None, weights_backbone=weights, num_classes=self.out_channels, aux_loss=False)
        channels = config.in_channels * config.patch**2
        if channels != 3:
            self.network.backbone.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        return self.network.classifier[-1]

    def bottleneck(self, x: Tensor) -> Tensor:
        return self.network.backbone(x)["out"]

    def body(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


class Smp(SegmentationModel):
    """A network of segmentation_models_pytorch: `model.encoder` names one of its encoders, for its U-Net, or
    architecture/encoder, such as `segformer/mit_b0`."""

    def __init__(self, config: ModelConfig) -> None:
        try:
            import segmentation_models_pytorch as smp
        except ImportError:
            raise UserError("model.name=smp needs segmentation_models_pytorch: pip install 'unet_ray[smp]'") from None
        super().__init__(config, multiple_of=32)
        architecture, _, encoder = config.encoder.rpartition("/")
        try:
            self.network = smp.create_model(
                architecture or "unet",
                encoder,
                encoder_weights="imagenet" if config.pretrained else None,
                in_channels=config.in_channels * config.patch**2,
                classes=self.out_channels,
                **({"dynamic_img_size": True} if architecture == "dpt" else {}),
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"model.encoder {config.encoder!r}: {' '.join(str(error).split())[:200]}") from None

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        return [module for module in self.network.segmentation_head.modules() if isinstance(module, nn.Conv2d)][-1]

    @property
    def encoder(self) -> nn.Module:
        return self.network.encoder

    def bottleneck(self, x: Tensor) -> Tensor:
        levels = self.network.encoder(x)
        return (levels[0] if self.config.encoder.startswith("dpt/") else levels)[-1]  # dpt's has tokens beside them

    def body(self, x: Tensor) -> Tensor:
        return self.network(x)


class Otsu(SegmentationModel):
    """Separates each image's gray levels by Otsu's threshold (Otsu 1979, equation 17).

    Training learns only which side of the threshold is which class, and how certain that is: for each class, logits
    are a straight line over the distance from the threshold.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = nn.Conv2d(config.patch**2, self.out_channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def bottleneck(self, x: Tensor) -> Tensor:
        """Returns the pixels and their squares: an image's brightness and contrast stand for its content."""
        return torch.cat([x, x**2], dim=1)

    def body(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.config.in_channels, -1)).mean(dim=1)
        low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
        level = ((x - low) / (high - low).clamp(min=1e-6) * (GRAY_LEVELS - 1)).round()
        threshold = torch.stack([otsu_threshold(one) for one in level]).reshape(-1, 1, 1, 1)
        # The side of the threshold dominates; the distance only adds how certain it is.
        return self.head(torch.where(level > threshold, 1.0, -1.0) + (level - threshold - 0.5) / GRAY_LEVELS)


def otsu_threshold(levels: Tensor) -> Tensor:
    """Returns the gray level, 0 to 255, that maximises the variance between the levels up to it and those above."""
    count = torch.bincount(levels.reshape(-1).long(), minlength=GRAY_LEVELS).double()
    share = count / count.sum()
    below = share.cumsum(0)
    mean = (share * torch.arange(GRAY_LEVELS, device=levels.device)).cumsum(0)
    between = (mean[-1] * below - mean) ** 2 / (below * (1 - below)).clamp(min=1e-12)
    return between.argmax().to(levels.dtype)


__all__ = ["Otsu", "Smp", "Torchvision", "otsu_threshold"]
