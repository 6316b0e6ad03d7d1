"""Tests of the three packages, and tests.support, which benchmarks and the demo use, too."""
