"""Studies: many evaluations under one protocol, their tables, figures and reports."""
