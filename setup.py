"""The packages, and the bundles, which a wheel has within `autosam`; all else is in setup.cfg."""

from setuptools import find_packages, setup

PACKAGES = ("adapt", "autosam", "components", "release", "serving", "study")

setup(
    packages=[
        *find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
        "autosam.bundles",
    ],
    package_dir={"autosam.bundles": "bundles"},
)
