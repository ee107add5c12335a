"""``zolightning plan``: which ways to train fit a machine, known before anything is downloaded or run."""
