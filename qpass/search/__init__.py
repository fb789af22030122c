"""Transforms that are found from data: which element of its group a region changes by."""
