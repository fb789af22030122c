"""Runnable scripts, each executed by a test."""
