"""A small world to try everything on, and its tiny models: `python -m toy`."""
