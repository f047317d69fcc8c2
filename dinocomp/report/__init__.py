"""A run's folder on one page, and several runs side by side: files -> `RunRecord` -> HTML. Nothing else is asked."""

from dinocomp.report.compare import render_comparison
from dinocomp.report.page import render
from dinocomp.report.record import RunRecord, read_run
from dinocomp.report.write import PAGE, write_page, write_report

__all__ = ["PAGE", "RunRecord", "read_run", "render", "render_comparison", "write_page", "write_report"]
