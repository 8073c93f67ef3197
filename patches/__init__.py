"""Deviations from upstream, one folder each: what, why, for which version, and the test that needs it."""
