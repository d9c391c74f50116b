"""MetaBalance's study (He et al., 2022, sections 5 and A) on data of your own.

    data      sizes, and the rows that train nothing
    tune      the optimizer's settings for the plain sum
    table1    strategies
    table2    all methods
    table3    chains
    table4    no moving average
    figure1   gradient magnitudes by task and layer, as in the paper's Figures 1 and 2
    figure3   relax factors
    figure4   training loss
    figure5   optimizers

    python -m examples.studies.metabalance data --data ../data/tmall
    python -m examples.studies.metabalance table2 --data ml-100k --out results
    python -m examples.studies.metabalance figure3 --data synthetic-ijcai --scale 1/64

Each command prints a table and writes it as Markdown and CSV to `--out`, a figure with its picture;
`--resume` goes on from there.
"""

import sys
from fractions import Fraction

from examples.studies.harness.command import Command, study

OPTIONS = {
    "data": {
        "default": "synthetic-ijcai",
        "help": "a folder with buy.csv[.gz], view.csv[.gz], ...; the raw file of UserBehavior-2017 or "
        "IJCAI-2015; ml-100k; synthetic-ijcai or synthetic-userbehavior",
    },
    "scale": {"type": Fraction, "default": Fraction(1, 64), "help": "of it: 1, 1/8 or 1/64"},
    "relatedness": {"type": float, "default": 0.7, "help": "of its tasks to the target, 0 to 1"},
    "seeds": {"default": 5},
    "trials": {"default": 8},
    "batch_pairs": {"type": int, "help": "pairs of a step"},
}
TABLES, FIGURES = "table1 table2 table3 table4", "figure1 figure3 figure4 figure5"
COMMANDS = dict.fromkeys(
    f"data tune {TABLES} {FIGURES}".split(),
    Command("study", f"{' '.join(OPTIONS)} epochs out resume"),
)


main = study("examples.studies.metabalance", __doc__, COMMANDS, OPTIONS)

if __name__ == "__main__":
    sys.exit(main())
