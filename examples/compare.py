"""The main example: one multi-task recommender trained with several balancing methods, and a table.

    python -m examples.compare [--help]

What it compares, on what and how, is declared in `examples/studies/recommender/comparison.py`. It takes at
most two minutes on two CPU cores, and needs a checkout.
"""

import sys

from examples.studies.recommender.comparison import main

if __name__ == "__main__":
    sys.exit(main())
