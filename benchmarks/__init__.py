"""Benchmarks: speed and memory of this project's encoder, training and inference compared with other projects'."""
