"""The records of a run: metrics, memory figures, and the MLflow store that they go to."""
