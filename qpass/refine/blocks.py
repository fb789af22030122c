"""Blocks of a model are rounded as wholes: codes and scales by gradients of what a block gives.

As in "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound, 2020) codes are
learned, and as in "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction"
(2021) for all weights of a block at once, from the error of its output weighed by the Fisher
information of the model's own. Gradients pass the rounding straight, and scales are learned beside
the codes, as in "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(AutoRound, 2023). Different from these papers: the start are the codes that a rounding has found,
whatever it is, a block's inputs are those of the quantized model, the Fisher information has
directions besides its diagonal, steps are those of Adam instead of signs (which undid what the
rounding had found), and a block keeps its start unless held-out data say that the end is better.
Checked: no error on held-out data grows, and codes are read as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.ir import Note
from qpass.plan.refiner import REFINERS, Refiner, Refining
from qpass.refine.bottlenecks import blocks_of
from qpass.refine.errors import find_costs, loss_of
from qpass.refine.pair import Pair
from qpass.refine.training import Training, split, taken


@final
@dataclass(frozen=True, slots=True)
class Blocks(Refiner):
    """A number of `passes` over the data.

    In all steps together a place can come about as far as `rate`, in points, and a scale as far as
    `scale_rate`, in parts of itself. Places start `keep` of the way to the borders of their cells.
    """

    name: str = "blocks"
    passes: int = 6
    rate: float = 0.15
    scale_rate: float = 0.04
    keep: float = 0.9

    def refine(self, task: Refining) -> tuple[Note, ...]:
        pair = Pair(task)
        blocks = blocks_of(task, pair)
        if not blocks:
            return (
                Note(
                    False,
                    self.name,
                    "no value of the model is a bottleneck behind weights of one place",
                ),
            )
        costs = find_costs(task, [end.name for block in blocks for end in block.ends])
        learned, held = split(len(task.batches))
        before = after = 0.0
        gained = 0
        for at, block in enumerate(blocks):
            task.advance("refine blocks", at, len(blocks))
            starts = pair.quantized.before(block.first)
            wants = [pair.float.advance(end.name) for end in block.ends]
            loss = loss_of([costs[end.name] for end in block.ends])
            training = Training(task, pair, block, starts, taken(wants), loss)
            training.soften(self.keep)
            softs = training.softs.values()
            places = [soft.place_ngl for soft in softs], self.rate
            scales = [scale for soft in softs for scale in soft.scales], self.scale_rate
            first = last = training.mean(held)
            training.learn([places, scales], learned, self.passes)
            if (end := training.mean(held)) < first:
                training.keep()
                last = end
                gained += 1
            before, after = before + first, after + last
        task.advance("refine blocks", len(blocks), len(blocks))
        why = f"{gained} of {len(blocks)} blocks: held-out error {before:.4g} becomes {after:.4g}"
        return (Note(gained > 0, self.name, why),)


REFINERS.add(Blocks())
