"""Methods as values: estimators, shaping, optimizers, and the configurations and recipes composed of them."""
