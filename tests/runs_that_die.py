"""Runs for the workers of `test_cohort.py`, which stand for those of a bundle and import neither torch nor MONAI."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace


class Deadly:
    """A run whose worker dies with the case `deadly`, and the first time with `once`."""

    options = {"device": "cpu"}  # noqa: RUF012

    def __call__(self, _log, *, use, **_) -> None:
        def segment(case):
            if case.name == "deadly" or (case.name == "once" and not Path("died").exists()):
                Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return f"{case.name} by {os.getpid()}", False

        case_class = type("Case", (), {})
        sys.modules["autosam.cohort"] = SimpleNamespace(Case=case_class, CaseSegmenter=lambda *_, **__: segment)
        use(None)


class WithoutModel(Deadly):
    """A run that cannot start."""

    def __call__(self, _log, **_) -> None:
        raise ValueError("there is no model")
