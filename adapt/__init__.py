"""Bundles for a user's own data: `autosam new NAME FOLDER`."""
