"""Settings that are known to work, one YAML file each; `unet-ray recipes` lists them."""
