"""One run: the order of its stages, what can be resumed, the output folder."""
