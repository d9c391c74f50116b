"""MultiBalance's experiments (He et al., 2024, section 5) on data of your own.

    python -m examples.studies.multibalance table3 --data synthetic --out results
    python -m examples.studies.multibalance table3 --data ../data/hillstrom --seeds 5 --out results
    python -m examples.studies.multibalance table2 --rounds 20

Each command prints a table and writes it as Markdown and CSV to `--out`, figure2 with a picture; `--resume`
goes on from the finished runs there. --data: a folder that holds Hillstrom's or the census file, or train
and test files in the form of AliExpress or Ali-CCP; or `synthetic`, a made log of `--size` impressions.
"""

import sys

from examples.studies.harness.command import Command, study

TRAINED = "data size seeds trials epochs batch mean_over jobs out resume quick"
# The speed alone needs neither rich nor pandas.
COMMANDS = {
    "tune": Command("study", "the optimizer's settings for the plain sum", TRAINED),
    "table2": Command(
        "speed",
        "the speed of training with the representation balanced, or the parameters of a module",
        "size batch rounds out quick",
    ),
    "table3": Command(
        "study", "gains in normalized entropy, all methods on the representation", TRAINED
    ),
    "table4": Command("study", "the learning rate of MultiBalance's weights", TRAINED),
    "figure2": Command("study", "gradient magnitudes and weights over the steps", TRAINED),
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
