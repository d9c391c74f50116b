"""The public signatures tell right uses from wrong ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

USES = Path(__file__).resolve().parent / "typed" / "uses.py"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("basedpyright"), reason="needs the lint extra")
def test_a_type_checker_finds_the_wrong_uses(tmp_path: Path) -> None:
    source = USES.read_text("utf-8")
    (tmp_path / "uses.py").write_text(source, "utf-8")
    settings = {"typeCheckingMode": "basic", "reportPrivateImportUsage": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    command = ["basedpyright", "--pythonpath", sys.executable, "--outputjson", "uses.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(result.stdout)["generalDiagnostics"]
    errors = {entry["range"]["start"]["line"] for entry in found if entry["severity"] == "error"}
    wrong = {k for k, line in enumerate(source.splitlines()) if line.endswith("# wrong")}
    assert errors == wrong, [entry["message"] for entry in found]
