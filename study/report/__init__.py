"""The report of a study: tables beside the paper's, significance, figures, clinical measures, and one page of all."""

from study.report.write import write_report

__all__ = ["write_report"]
