"""Starts the dashboard's server. A file to run by its path, so that it works in any folder: ``launch.py --store URI``.

Works from a checkout as well as installed: this folder is the package ``zolightning_dashboard``, whichever copy is installed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_NAME, _HERE = "zolightning_dashboard", Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if entry != str(_HERE)]  # its files must not pass for other people's packages
if _NAME not in sys.modules:
    _spec = spec_from_file_location(_NAME, _HERE / "__init__.py")
    assert _spec is not None
    sys.modules[_NAME] = module_from_spec(_spec)

if __name__ == "__main__":
    sys.exit(import_module(f"{_NAME}.serve").main())
