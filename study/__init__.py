"""Studies: a grid of trainings, each an unchanged bundle run in a folder of its own, and one report of them all.

Raises:
    ModuleNotFoundError: on import, if a package of the `study` extra is not installed.
"""

from importlib.util import find_spec

_MISSING = [name for name in ("jinja2", "pandas", "sklearn", "tabulate") if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"a study needs {', '.join(_MISSING)}, not installed: pip install -c constraints.txt -e '.[study]'"
    )
