"""What a comparison shows: tables, pictures of what a query sees and of what it misses, and a self-contained page."""

from dit_accel.eval.report.heat_map import heat_map, heat_map_scales
from dit_accel.eval.report.page import MethodResult, ReportData, write_report
from dit_accel.eval.report.tables import MISSING, format_table, summary
from dit_accel.eval.report.tile_picture import tile_picture

__all__ = [
    "MISSING",
    "MethodResult",
    "ReportData",
    "format_table",
    "heat_map",
    "heat_map_scales",
    "summary",
    "tile_picture",
    "write_report",
]
