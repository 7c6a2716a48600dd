"""Bundles for a user's own data: `python -m adapt new NAME --data FOLDER`."""
