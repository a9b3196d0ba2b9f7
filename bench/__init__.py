"""Measurements. Timings live here, never in a test."""
