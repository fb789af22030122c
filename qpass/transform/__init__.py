"""Exact rewrites: fold norms into their readers, rotate regions, insert online transforms."""

from qpass.transform.fold_norms import FoldNorms
from qpass.transform.insert_online import InsertOnline
from qpass.transform.insert_pairs import InsertPairs
from qpass.transform.rewrite import Rewritten, carry_out, fold_and_rewrite, rewrite
from qpass.transform.rotate_regions import RotateRegions

__all__ = [
    "FoldNorms",
    "InsertOnline",
    "InsertPairs",
    "Rewritten",
    "RotateRegions",
    "carry_out",
    "fold_and_rewrite",
    "rewrite",
]
