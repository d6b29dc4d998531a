"""The papers' experiments, each by one command: ``monoloss reproduce``."""
