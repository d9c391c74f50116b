"""EMTL's experiments (Yuan and Zhang, 2023, section 5): `python -m examples.studies.emtl COMMAND`.

    python -m examples.studies.emtl figure1 --out results
    python -m examples.studies.emtl table1 --data ../data/census_income_kdd --out results
    python -m examples.studies.emtl table3 --quick

Each command prints a table and writes it as Markdown and CSV, most with a picture, to `--out`.
"""

import sys

from examples.studies.harness.command import Command, study

COMMANDS = {
    "figure1": Command(
        "figure1",
        "a toy problem with two losses: five starting points, eight methods",
        "steps out quick",
    ),
    "table1": Command(
        "tables",
        "MMoE and PLE with all methods on two binary tasks",
        "data seeds epochs trials examples out resume quick",
    ),
    "table2": Command(
        "dense",
        "segmentation, depth and normals of rendered scenes",
        "data seeds steps trials out resume quick",
    ),
    "table3": Command(
        "tables",
        "a click, a completion rate and a watch time of a synthetic log",
        "seeds epochs trials examples out resume quick",
    ),
}


main = study("examples.studies.emtl", __doc__, COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
