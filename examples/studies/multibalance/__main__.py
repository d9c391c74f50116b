"""MultiBalance's experiments (He et al., 2024, section 5) on data of your own.

    tune      the optimizer's settings for the plain sum
    table2    the speed of training with the representation balanced, or the parameters of a module
    table3    gains in normalized entropy, all methods on the representation
    table4    the learning rate of MultiBalance's weights
    figure2   gradient magnitudes and weights over the steps

    python -m examples.studies.multibalance table3 --data synthetic --out results
    python -m examples.studies.multibalance table3 --data ../data/hillstrom --seeds 5 --out results
    python -m examples.studies.multibalance table2 --rounds 20

Each command prints a table and writes it as Markdown and CSV to `--out`, figure2 with a picture; `--resume`
goes on from the finished runs there. --data: a folder that holds Hillstrom's or the census file, or train
and test files in the form of AliExpress or Ali-CCP; or `synthetic`, a made log of `--size` impressions.
"""

import sys

from examples.studies.harness.command import Command, study

TRAINED = Command("study", "data size seeds trials epochs batch mean_over jobs out resume quick")
COMMANDS = {
    "table2": Command("speed", "size batch rounds out quick"),
    **dict.fromkeys(("tune", "table3", "table4", "figure2"), TRAINED),
}
OPTIONS = {
    "data": {"default": "synthetic", "help": "see above (default: synthetic)"},
    "mean_over": {
        "choices": ("batch", "counted"),
        "default": "batch",
        "help": "what a loss is divided by: the size of the batch (default, as in the paper), or the "
        "number of examples that count for the task",
    },
}


main = study("examples.studies.multibalance", __doc__, COMMANDS, OPTIONS)

if __name__ == "__main__":
    sys.exit(main())
