"""Bulk image segmentation on Ray: train a U-Net, segment whole folders or buckets, score the result.

Three verbs, each a function with a typed result and a command of the same name:

    from unet_ray.training import train          # unet-ray train
    from unet_ray.prediction import predict      # unet-ray predict
    from unet_ray.evaluation import evaluate     # unet-ray evaluate

Importing this package loads neither torch nor Ray.
"""

__version__ = "0.1.0"
