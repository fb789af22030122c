"""Exact rewrites: fold norms and gains, rotate regions, insert online transforms."""

from qpass.transform.change_regions import ChangeRegions
from qpass.transform.fold_norms import FoldNorms
from qpass.transform.fold_scales import FoldScales
from qpass.transform.insert_online import InsertOnline
from qpass.transform.insert_pairs import InsertPairs
from qpass.transform.rewrite import Rewritten, carry_out, fold_and_rewrite, rewrite
from qpass.transform.rotate_regions import RotateRegions

__all__ = [
    "ChangeRegions",
    "FoldNorms",
    "FoldScales",
    "InsertOnline",
    "InsertPairs",
    "Rewritten",
    "RotateRegions",
    "carry_out",
    "fold_and_rewrite",
    "rewrite",
]
