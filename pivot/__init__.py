"""How it is run: processes and sharding, optimisation, run folders, flags, models, encoders, data.

A stage or a fork of one needs this folder, model.py and data.py, and nothing else of the
repository.
"""
