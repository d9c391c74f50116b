"""Checks that a tag and the files that name a version agree; prints what does not.

python .github/release_check.py vX.Y.Z
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def found_in(root: Path, name: str, pattern: str) -> list[str]:
    """What a pattern finds in a file."""
    return re.findall(pattern, (root / name).read_text(encoding="utf-8"), flags=re.M)


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What keeps this tree from being released under `tag`."""
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        return [f"the tag must look like v1.2.3; found {tag}"]
    version = tag.removeprefix("v")
    named = {
        "mtl_optax/__init__.py": found_in(root, "mtl_optax/__init__.py", r'^__version__ = "(.*)"$'),
        "CITATION.cff": found_in(root, "CITATION.cff", r"^version: (.*)$"),
        "README.md": found_in(root, "README.md", r"Version ([0-9][0-9.]*[0-9])"),
        "CHANGELOG.md": found_in(root, "CHANGELOG.md", r"^## \[([0-9][^\]]*)\]")[:1],
    }
    wrong = [
        f"{name} must name the version {version}; found {', '.join(versions) or 'none'}"
        for name, versions in named.items()
        if versions != [version]
    ]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, flags=re.M):
        wrong.append(f"CHANGELOG.md must have a heading '## [{version}] - YYYY-MM-DD'")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, flags=re.M | re.S)
    if unreleased and "- " in unreleased[1]:
        wrong.append("CHANGELOG.md still has entries under Unreleased")
    return wrong


if __name__ == "__main__":
    sys.exit("\n".join(problems(*sys.argv[1:])) or None)  # an empty text would be a failure
