"""One page of a run that people can look at, and the same pictures for papers."""

from mmssl.evaluation.report.page import write_report

__all__ = ["write_report"]
