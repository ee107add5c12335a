"""The ranking page, as Streamlit runs it for each visit; :mod:`zolightning_dashboard.ranking` starts the server."""

import sys
from importlib import import_module
from pathlib import Path

import_module("zolightning_dashboard.ranking.page").main(Path(sys.argv[1]))
