"""The bundles as MONAI Label's models."""
