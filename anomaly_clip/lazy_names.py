"""Names of a package that are imported at their first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

__all__ = ["lazy_names"]


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose names are in its modules.

    Type checkers and the help of the command line read the same names from imports under
    ``TYPE_CHECKING``.

    Args:
        package: The package.
        modules: Names by module.

    Example:
        >>> from anomaly_clip.lazy_names import lazy_names
        >>> find, _ = lazy_names("anomaly_clip", {"errors": ["suggest"]})
        >>> find("suggest").__module__
        'anomaly_clip.errors'
    """
    places = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in places:
            # Python names a similar attribute of the object below the traceback.
            error = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(error, name=name, obj=sys.modules[package])
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return __getattr__, __dir__
