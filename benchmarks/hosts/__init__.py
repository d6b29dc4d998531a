"""One training step of each host's own code, with and without MonoLoss."""
