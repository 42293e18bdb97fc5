"""Studies: many evaluations under one protocol, their tables, figures and reports. Command: `python -m study`.

The files; each imports only those above it:

    volumes, tables         volumes and measurements of one case; the results of all runs as CSV, JSON, Markdown
    results                 a results folder as figures and reports see it
    figures/                the paper's figures, and how sure the masks are
    page, report_tables, report    one HTML page about a results folder
    plan, runner            a study's YAML; the runs it names, trained and evaluated
    shifts/                 changes to a volume, and what each of them costs
    floor                   the best intensity threshold that there is, an oracle
    label_study             the labels that the student learns from, against masks
"""
