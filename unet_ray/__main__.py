"""Makes `python -m unet_ray` run `unet-ray`."""

from __future__ import annotations

from unet_ray.cli import main

if __name__ == "__main__":
    main()
