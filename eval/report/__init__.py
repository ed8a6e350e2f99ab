"""What a comparison shows: tables, pictures of what a query sees, and a self-contained page."""

from dit_accel.eval.report.page import MethodResult, ReportData, write_report
from dit_accel.eval.report.tables import MISSING, format_table, summary
from dit_accel.eval.report.tile_picture import tile_picture

__all__ = ["MISSING", "MethodResult", "ReportData", "format_table", "summary", "tile_picture", "write_report"]
