"""Packaging: each bundle as an archive that needs nothing of this repository, in the layout of MONAI's model zoo."""
