"""Charts, plots and reports: results as pictures and pages."""
