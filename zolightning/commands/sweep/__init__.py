"""The sweep: methods, learning rates and seeds on one task, at equal budgets."""
