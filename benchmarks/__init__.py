"""Benchmarks of quality, speed and cost; README.md here is their index."""
