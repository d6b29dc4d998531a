"""What MonoScore and MonoLoss cost, against the papers' algorithms: ``python -m benchmarks``."""
