"""What a run leaves behind: metrics, memory figures, and the MLflow store that they go to."""
