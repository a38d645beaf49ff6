"""A layer is an object, one file a kind; `factored_layer` finds the kind of a module.

A new kind is one file here: every module of this package is imported, and what derives from `Layer`
is found.
"""

from importlib import import_module
from pkgutil import iter_modules

from tekfac_edu.optim.layers.base import Layer, factored_layer, kind_of, refusal

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["Layer", "factored_layer", "kind_of", "refusal"]
