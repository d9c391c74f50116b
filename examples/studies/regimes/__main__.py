"""When does one run of balancing pay for a target with auxiliaries? Regimes of losses, fixed beforehand.

    python -m examples.studies.regimes run --data ../data/tmall --out results
    python -m examples.studies.regimes tables --rows results/rows.jsonl --out results

`run` prints its plan first, trains the most important runs first, and writes every finished run at once to
`rows.jsonl` in `--out`; `--resume` goes on from there, on another machine too. `tables` shows what the rows
of one or several files say.
"""

import sys
from pathlib import Path

from examples.studies.harness.command import Command, study

OPTIONS = {
    "data": {
        "default": "synthetic",
        "help": "a folder with buy, fav and view.csv[.gz]; or synthetic",
    },
    "seeds": {"default": 8, "help": "fresh seeds of every arm (default %(default)s)"},
    "curve_seeds": {"type": int, "default": 3, "help": "of the curves (default %(default)s)"},
    "tuning_seeds": {"type": int, "default": 3, "help": "of each setting (default %(default)s)"},
    "rows": {"type": Path, "nargs": "+", "required": True, "metavar": "FILE", "help": "rows.jsonl"},
}
COMMANDS = {
    "run": Command("study", "data seeds curve_seeds tuning_seeds epochs jobs out resume"),
    "tables": Command("study", "rows out"),
}


main = study("examples.studies.regimes", __doc__, COMMANDS, OPTIONS)

if __name__ == "__main__":
    sys.exit(main())
