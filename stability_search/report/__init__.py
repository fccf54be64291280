"""The report of a study: an HTML page, a Markdown summary, JSON, the terminal's last lines."""

from stability_search.report.context import Report
from stability_search.report.document import json_schema, render_json
from stability_search.report.markdown import render_markdown
from stability_search.report.page import render_html
from stability_search.report.terminal import verdict_lines
from stability_search.report.writing import write_report

__all__ = [
    "Report",
    "json_schema",
    "render_html",
    "render_json",
    "render_markdown",
    "verdict_lines",
    "write_report",
]
