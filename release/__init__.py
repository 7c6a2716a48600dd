"""Packaging: each bundle as a self-contained archive, in the layout of MONAI's model zoo."""
