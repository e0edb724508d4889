"Commands for the shell; `sparsefast.cli.train` was `sparsefast.cli`, and its names are still found here"
from importlib import import_module

def __getattr__(name):
    if name.startswith('__'): raise AttributeError(name)
    return getattr(import_module('sparsefast.cli.train'), name)
