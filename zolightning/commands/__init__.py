"""What runs behind the ``zolightning`` command."""
