"""EMTL's experiments (Yuan and Zhang, 2023, section 5): `python -m examples.studies.emtl COMMAND`.

    figure1   a toy problem with two losses: five starting points, eight methods
    table1    MMoE and PLE with all methods on two binary tasks
    table2    segmentation, depth and normals of rendered scenes
    table3    a click, a completion rate and a watch time of a synthetic log

    python -m examples.studies.emtl figure1 --out results
    python -m examples.studies.emtl table1 --data ../data/census_income_kdd --out results
    python -m examples.studies.emtl table3 --quick

Each command prints a table and writes it as Markdown and CSV, most with a picture, to `--out`.
"""

import sys

from examples.studies.harness.command import Command, study

COMMANDS = {
    "figure1": Command("figure1", "steps out quick"),
    "table1": Command("tables", "data seeds epochs trials examples out resume quick"),
    "table2": Command("dense", "data seeds steps trials out resume quick"),
    "table3": Command("tables", "seeds epochs trials examples out resume quick"),
}


main = study("examples.studies.emtl", __doc__, COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
