"""Models that answer and give no gradient: in an inference engine, behind a function or a server."""
