"""A page on which a person ranks the candidates of a training: ``python -m zolightning_dashboard.ranking FOLDER``."""
