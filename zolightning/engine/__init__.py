"""One fit without Lightning: the subspace that is searched, the estimate of a step, and its update."""
