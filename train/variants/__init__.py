"""One file a paper. Dropping a file into this folder is all it takes to add a variant."""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f".{_module}", __name__)
