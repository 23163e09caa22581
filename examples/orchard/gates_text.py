"""The words of docs/experiment-graft.md that do not depend on the results, and a scenario's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """# Graft against the other methods, on the orchard

Written by `examples/orchard/gates_page.py` from `examples/orchard/gates_results.json`, which
`examples/orchard/gates_experiment.py` fills; do not edit. One command makes all of it, and goes on where it stopped.

**kept** is the mean over the skills of `(base - merged) / (base - expert)`, losses per answer token: 1 where a merge is
as good as each expert on its own skill; the columns of the skills have each one's own. Brackets are 95 % intervals of a
paired bootstrap over test items, which nothing here was trained, tuned or stopped by. *text* and *MMLU* are what nobody
was trained for: the loss on general text, and how many of the development questions are answered right. *statistic* is
what a merge has to be told of the examples, on disk: moments for all models, or a file of gates; then CPU seconds of
measuring it, of making the row (tuning, training, solving) and of merging. Tuned rows chose among three or four
settings by what is kept on dev. One seed, one base model of 135 million parameters, on one machine that did other
work as well.
"""


def sizes(held: Mapping[str, Any]) -> str:
    """How much was spent, and by what versions."""
    budget = held["budget"]
    rows = held["rows"]
    items = ", ".join(f"{skill} {len(rows['base']['test'][skill])}" for skill in (*held["skills"], "text", "mmlu"))
    return (
        f"{budget['dev']} dev items and {budget['samples']} training examples a skill; test items: {items}; trainings "
        f"of at most {budget['steps']} steps of 4 examples. Seed {held['seed']}, torch {held['versions']['torch']}."
    )


WHY = """
## What holds of the paper's claims here, and what does not

**The entropy gate does not tell experts apart.** It looks at the histogram of whole weights, which the experts share
with their base: the entropies of math and languages differ by 0.0007 on average over the 210 matrices, while the
matrices' own spread is 0.28. With c 500 that makes a w_global of 0.32 to 0.64, of the two full experts 0.45 to 0.54,
on average 0.035 and 0.011 away from a half, and it is squashed after that. The global gate alone comes out as the
plain average.

**The squashing keeps the local gates from doing much.** `exp(-g l)` and a softmax over numbers between 0 and 1 hold
every weight within 0.41 and 0.59 of two models, within 0.23 and 0.29 of four, whatever phi says (last column of the
tables of trainings). Both gates together beat the average of two experts by 0.007, and are 0.002 below that of four.
With `sharpness: 20`, which the paper does not have, the same 420 numbers of phi, trained alike, use the whole range
from 0 to 1 and keep 0.957 of the pair's gains instead of 0.922: that one number is worth more than all else in the
formula. Of the four it is not told apart from 1 (0.603 and 0.593): what three experts win by sharper gates code
loses, all of it. Learnt with phi, the sharpness came to 2.7 and kept less than 1 does.

**The rest of the formula hardly matters.** On the pair, spectral norms instead of entropies, 20 bins, c 600, a 0.6
and 8 examples instead of 30 move what is kept by 0.001 or less; 8 x 8 blocks take 0.001 away, the MLPs alone 0.001,
attention alone 0.006. A phi for every channel adds 0.006 with 740 times the numbers; at sharpness 20 it is the best
trained gate (0.971, 0.014 [-0.006, 0.033] more than the affine one). The small network keeps less there (0.929), and
the dense phi, 174 million numbers, found nothing in 20 steps that dev liked better than its start (0.920).

**Joint is better than one after another.** A fold of four keeps 0.467, 0.126 less than the joint gates: the first
expert of the row is halved three times (mathematics 0.24, languages, the last, 0.84).

**Weights of outputs that sum to one are the wrong side.** Solved exactly, without squashing, they keep little more
than the average: an output channel that serves two experts can only be shared out. Free coefficients, which may add
up, keep more; trained from there they keep more still, with the most numbers to learn. All of them are one number for
an output channel, whatever comes in.

**What works is a gate on the inputs.** The experts' domains differ in what comes in, and a k x k matrix on the
directions that the deltas read can tell it apart: `core_regmean`. The adapters' own directions are most of it; 32
random probes, which let the regression see the rest of the inputs, and balancing the experts, so that one that
changes much does not win over one that changes little, bring it to RegMean's score. Of full models it measures the 16
main directions of each delta, and adds up what lies outside. It does not reach RegMean everywhere: of the pair it
keeps 0.985, 0.013 [0.005, 0.021] less, with a statistic 202 times smaller. More is to be had: RegMean with the inputs
behind the merged layers (`RegMean++`, two runs) keeps 0.982 of the four, 0.023 more than RegMean. The core's inputs
could be measured there too; that has not been done.

**Written answers say the same, lower.** Of 40 word problems `core_regmean` solves 8, RegMean 7, tuned task arithmetic,
TIES and DARE none (the expert 15); of 60 sentences 7, 11, 3, 2 and 3 are right word by word (the expert 17).

**Without examples the spectrum helps, weights by norms do not.** Of what looks at weights alone, of four adapters,
flattened singular values keep most (`Iso-C` 0.829, its scale tuned on dev), then `TSV` (0.766); `WUDI`,
`opt_merge`, `KnOTS`, DARE and task arithmetic are within 0.011 of each other (0.679 to 0.690), tuned or as they come.
`NaN`, the other study's best first try, comes out as the average does (0.599); `MetaGPT` 0.531.
`RobustMerge`'s default scale is for its products of factors; of the adapters' products it ruins the model.

## How `core_regmean` came to its defaults

By a script that is not kept, on eight dev items a skill, four adapters: the adapters' directions alone 0.895; balanced
by half the power 0.918, wholly 0.900; with 16 main directions of the inputs 0.930, and balanced 0.942; with 16 random
directions instead 0.916; balanced with 32 random ones 0.944, 64 0.945, 32 main ones 0.945, the 32 loudest channels
0.939; RegMean 0.945, balanced as well 0.952. A ridge of 1e-3 instead of 1e-4 took 0.005 away, RegMean's shrinking of
off-diagonal entries 0.007. Random directions need no run of their own and no room in the files, so they are the
default. Of the two full experts, what lies outside of the measured directions averaged 0.940, half again as much
0.960, added up 0.977; 8 instead of 16 directions a delta took 0.010 away; RegMean 0.959, task arithmetic at 1 0.976.

## Not run

The `full` budget; a second seed; a second base model.
"""
