"Layers that store and multiply their active weights only; the public names of `base`, `linear`, `conv` and `convert` are found here"
from . import base, conv, convert, linear, update
from .base import *
from .linear import *
from .conv import *
from .convert import *

__all__ = base.__all__+linear.__all__+conv.__all__+convert.__all__
