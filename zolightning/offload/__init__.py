"""Training what does not fit: weights in host memory or on a disk, one matrix at a time where operations read it."""
