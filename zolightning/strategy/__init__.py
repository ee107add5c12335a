"""Lightning's hooks, and nothing else."""
