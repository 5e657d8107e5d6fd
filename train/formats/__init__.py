"""Conversion of SAEs to and from the file formats of other libraries.

Each format is one module with a subclass of `base.Format`. Importing this package imports every module in the folder,
which registers the formats; a new format is therefore one new file.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f".{_module}", __name__)
