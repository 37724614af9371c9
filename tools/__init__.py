"""Commands beside the recipe: `python -m tools.NAME`."""
import pivot  # noqa: F401
