"""Reports on many runs: records, aggregation over seeds, tables, plots, HTML pages, comparison and removal."""
