"""How good an index is: ground truth, protocols, metrics and the report that shows them."""

from cbir.evaluation.comparison import Comparison, Figures, Row, write_comparison
from cbir.evaluation.gallery import Gallery, QueryCase, choose_cases
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery, Protocol, read_ground_truth
from cbir.evaluation.metrics import Quality, QueryQuality, ann_recall, average_precision, evaluate
from cbir.evaluation.report import Counts, QuarantineRow, Report, SearchFigures, StageRow, write_report
from cbir.evaluation.search_page import Matches, SearchRow, write_search_page

__all__ = [
    "Comparison",
    "Counts",
    "Figures",
    "Gallery",
    "GroundTruth",
    "GroundTruthQuery",
    "Matches",
    "Protocol",
    "Quality",
    "QuarantineRow",
    "QueryCase",
    "QueryQuality",
    "Report",
    "Row",
    "SearchFigures",
    "SearchRow",
    "StageRow",
    "ann_recall",
    "average_precision",
    "choose_cases",
    "evaluate",
    "read_ground_truth",
    "write_comparison",
    "write_report",
    "write_search_page",
]
