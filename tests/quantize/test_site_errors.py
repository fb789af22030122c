"""Are plans judged on the inputs as they were given, whatever graphs write to them?"""

from __future__ import annotations

import torch
from torch import nn

from qpass.capture import capture
from qpass.ir import edit
from qpass.quantize.errors import SiteErrors


def test_a_graph_that_counts_in_its_inputs_does_not_change_them() -> None:
    # as graphs of static caches do, for each of the programs that are run
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    program = capture(nn.Linear(4, 5), x).program
    last = program.graph.output_node()
    edit.call(program, last, torch.ops.aten.add_.Tensor, program.inputs[0], 1)
    before = x.clone()
    SiteErrors(program, program, [(x,)], lambda _: program)
    assert torch.equal(x, before)
