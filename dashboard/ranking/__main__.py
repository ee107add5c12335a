"""Starts the page's server: ``python -m zolightning_dashboard.ranking FOLDER``, or ``zolightning rank FOLDER``."""

import sys

from .serve import main

sys.exit(main())
