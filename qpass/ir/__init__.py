"""The program that passes read and write, and the only code that touches fx nodes."""

from qpass.ir import edit, pieces, read
from qpass.ir.passes import Check, Contract, Note, Pass, run_passes
from qpass.ir.program import Owner, Program
from qpass.ir.run import DIFFERENTIABLE, fresh, last_uses, run_node, run_nodes
from qpass.ir.weights import (
    Add,
    AddProduct,
    Affine,
    Basis,
    Block,
    ChangeBasis,
    Join,
    Numbers,
    Ones,
    Permute,
    Reshape,
    ScaleAxis,
    Step,
    Weight,
    Zeros,
)

__all__ = [
    "DIFFERENTIABLE",
    "Add",
    "AddProduct",
    "Affine",
    "Basis",
    "Block",
    "ChangeBasis",
    "Check",
    "Contract",
    "Join",
    "Note",
    "Numbers",
    "Ones",
    "Owner",
    "Pass",
    "Permute",
    "Program",
    "Reshape",
    "ScaleAxis",
    "Step",
    "Weight",
    "Zeros",
    "edit",
    "fresh",
    "last_uses",
    "pieces",
    "read",
    "run_node",
    "run_nodes",
    "run_passes",
]
