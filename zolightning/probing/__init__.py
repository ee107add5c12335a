"""How probes are run: the user's step at perturbed weights, always from the same state."""
