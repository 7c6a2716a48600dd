"""What a study found: tables beside the paper's, significance, figures, clinical read-out, and one page with it all."""

from study.report.write import write_report

__all__ = ["write_report"]
