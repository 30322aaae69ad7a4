"""Tables, figures and dashboards made from run folders; nothing here imports torch."""

from povid.report.command import write_tables

__all__ = ["write_tables"]
