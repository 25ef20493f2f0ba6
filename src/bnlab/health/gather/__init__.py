"""Gathers the evidence: each file measures one part of it, and `diagnose` joins them."""
