"""detkit: design, train, slim, search and deploy convolutional object detectors.

Importing this package loads no torch; the public functions, of :mod:`detkit.api`,
:mod:`detkit.comparison`, :mod:`detkit.detnas`, :mod:`detkit.pod` and :mod:`detkit.reporting`, are
looked up on first use.
"""

import importlib

from detkit.garbage import no_collection

__version__ = "0.1.0"

_API = {
    **dict.fromkeys(("build", "evaluate", "load", "predict", "train"), "detkit.api"),
    "compare": "detkit.comparison",
    "write_report": "detkit.reporting",
    **dict.fromkeys(("collect_scales", "decompose"), "detkit.pod"),
    "search": "detkit.detnas",
}
_SUBMODULES = ("api", "config", "data", "engine", "errors", "models", "ops", "scales", "types")
__all__ = ["__version__", *_API, *_SUBMODULES]


def __getattr__(name: str) -> object:
    with no_collection():  # most of it is the import of torch
        if name in _API:
            return getattr(importlib.import_module(_API[name]), name)
        if name in _SUBMODULES:
            return importlib.import_module(f"detkit.{name}")
    raise AttributeError(f"module 'detkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
