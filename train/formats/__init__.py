"""SAEs to and from other libraries. Dropping a file with a `Format` into this folder is all it takes to add one."""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f".{_module}", __name__)
