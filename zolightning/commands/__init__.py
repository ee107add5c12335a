"""The verbs of the ``zolightning`` command."""
