"""Pages about runs: one run (``run_report``), or several configurations side by side (``compare``)."""
