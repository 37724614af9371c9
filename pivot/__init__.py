"""How it is run: processes and sharding, optimisation, run folders, flags, models, encoders, data.

A stage or a fork of one needs this folder, model.py and data.py, and nothing else of the
repository.
"""
import sys


def end_of(kind, error, trace):
    """Ctrl-C while a command still imports: no traceback. (Afterwards distributed.launch ends it.)
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_of
for stream in (sys.stdout, sys.stderr):          # a terminal without × or é gets \xd7, no traceback
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
