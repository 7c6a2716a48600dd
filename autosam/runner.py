"""A run of MONAI's runner in this process: its command line, its log, and what it leaves."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

LOG = "autosam.log"
_FORMAT = "%(asctime)s %(levelname)s %(name)s - %(message)s"
_PLAIN = re.compile(r"[\w./][\w./-]*")  # a path that no program takes for something else


@dataclass(frozen=True)
class BundleRun:
    """A workflow of a bundle, as MONAI's runner takes it.

    Attributes:
        workflow: `training`, `evaluating`, `inferring` or `measuring`.
        bundle: the bundle's folder.
        configs: names of its configs without their suffix, later ones override earlier ones.
        options: values of knobs by name, as text or as they are typed in configs; a `Path` is a path of this computer.
    """

    workflow: str
    bundle: Path
    configs: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The arguments of `python -m monai.bundle`."""
        files = [f"{plain_path(self.bundle)}/configs/{name}.json" for name in self.configs]
        config_file = files[0] if len(files) == 1 else str(files).replace(" ", "")
        options = {"config_file": config_file, "bundle_root": plain_path(self.bundle), **self.options}
        texts = {name: plain_path(each) if isinstance(each, Path) else str(each) for name, each in options.items()}
        return ["run", self.workflow, *(text for name, value in texts.items() for text in (f"--{name}", value))]

    @property
    def line(self) -> str:
        """The command that does the same."""
        return " ".join(map(_quoted, ["python", "-m", "monai.bundle", *self.arguments]))

    def __call__(self, log: Path, *, verbose: bool = False, use: Callable[[Any], Any] | None = None) -> Any:
        """Run it.

        Args:
            log: file to which MONAI's lines are appended.
            verbose: whether they are shown as well.
            use: called with MONAI's initialised workflow instead of running it.

        Returns:
            what `use` returns; else MONAI's parser, which has what the run has made.
        """
        result: list[Any] = []
        with logged_to(log, self.line, verbose=verbose):
            import fire
            import monai.bundle

            from components.training.command_line import judged_as

            signature = inspect.signature(monai.bundle.run)

            @functools.wraps(monai.bundle.run)  # python-fire reads its arguments
            def run(*args: Any, **kwargs: Any) -> None:
                named = signature.bind(*args, **kwargs).arguments
                workflow = monai.bundle.create_workflow(**named.pop("override", {}), **named)
                result.append((use or _run_workflow)(workflow))

            arguments = self.arguments
            with judged_as(["monai.bundle", *arguments]):  # the log is set up already
                fire.Fire(run, command=[*arguments[1:], "--logging_file", "False"])
        return result[0]


def _run_workflow(workflow: Any) -> Any:
    workflow.run()
    workflow.finalize()
    return workflow.parser


def plain_path(path: Path) -> str:
    """Return a path as a config keeps it: as it was typed if it is plain, else absolute."""
    return str(path) if _PLAIN.fullmatch(str(path)) else os.path.abspath(path)  # noqa: PTH100


def _quoted(text: str) -> str:
    """Return an argument as it is typed in a shell; a list of configs in double quotes."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


class _Printed(io.TextIOBase):
    """What is printed during a run. MONAI's loggers keep this for good, so it is never closed."""

    target: TextIO | None = None

    def write(self, text: str) -> int:
        return (self.target or sys.stdout).write(text)

    def flush(self) -> None:
        (self.target or sys.stdout).flush()


_PRINTED = _Printed()


class _ToTerminal(logging.Handler):
    """Show this package's warnings, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def logged_to(file: Path, line: str, *, verbose: bool) -> Iterator[None]:
    """Append what is logged, printed and warned of to a file; show this package's own warnings.

    Args:
        file: the log, whose folder is made if missing.
        line: the command, for the log's first line.
        verbose: whether everything is shown as well.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    root, own = logging.getLogger(), logging.getLogger("components")
    engines = logging.getLogger("ignite.engine.engine")  # MONAI's StatsHandler says the same
    levels = [(logger, logger.level) for logger in (root, engines)]
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {line}\n")
        handlers: list[logging.Handler] = [logging.StreamHandler(stream)]
        if verbose:
            handlers.append(logging.StreamHandler(sys.stdout))
        for handler in handlers:
            handler.setFormatter(logging.Formatter(_FORMAT))
            root.addHandler(handler)
        shown = _ToTerminal(logging.WARNING)
        if not verbose:
            own.addHandler(shown)
        root.setLevel(logging.INFO)
        engines.setLevel(logging.WARNING)
        logging.captureWarnings(True)
        _PRINTED.target = sys.stdout if verbose else stream
        try:
            with contextlib.redirect_stdout(cast(TextIO, _PRINTED)):
                yield
        except Exception:
            logging.getLogger("autosam").exception("failed")
            raise
        finally:
            logging.captureWarnings(False)
            _PRINTED.target = None
            own.removeHandler(shown)
            for handler in handlers:
                root.removeHandler(handler)
            for logger, level in levels:
                logger.setLevel(level)
