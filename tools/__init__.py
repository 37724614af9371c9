"""Commands beside the recipe: `python -m tools.NAME`."""
