"""Many runs: records, aggregation over seeds, tables, plots, HTML."""
