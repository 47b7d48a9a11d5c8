"""unet-ray recipes."""

from __future__ import annotations

import click

from unet_ray.cli.options import Command
from unet_ray.settings import recipe_names, recipe_text


@click.command(cls=Command)
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes, or print one as YAML, ready for --config.

    \b
    Example:
      unet-ray recipes carvana-fast > mine.yaml
    """
    if name:
        click.echo(recipe_text(name), nl=False)
        return
    for recipe in recipe_names():
        click.echo(f"{recipe:<16} {recipe_text(recipe).splitlines()[0].removeprefix('# ')}")
