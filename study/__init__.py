"""Grids of trainings: each cell an unchanged bundle run in a folder of its own, and one table of them all."""
