"""Runs `unet-ray evaluate …` for `ray job submit --working-dir . -- python jobs/evaluate.py …`, with its exit codes."""

import sys
from pathlib import Path

# Import the checkout that was sent as the working directory, not a copy that may be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unet_ray.cli import run_command

if __name__ == "__main__":
    run_command("evaluate")
