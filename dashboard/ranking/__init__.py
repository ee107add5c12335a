"""A page on which a person ranks what a training shows: ``python -m zolightning_dashboard.ranking FOLDER``."""
