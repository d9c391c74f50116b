"""What the commands of the studies share: tables, errors, the folder of results, and threads."""

import importlib
import io
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from examples.studies.harness import command
from examples.studies.harness import report as tables
from examples.studies.harness.errors import UserError

PROGRAMS = [
    "compare",
    "studies.metabalance.__main__",
    "studies.regimes.__main__",
    "studies.multibalance.__main__",
    "studies.emtl.__main__",
    "studies.physics.__main__",
    "studies.benchmarks.__main__",
    "studies.benchmarks.clients",
    "studies.benchmarks.tpu",
    "studies.benchmarks.ways",
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_names_itself_and_has_errors_of_one_line(name, capsys):
    main = importlib.import_module(f"examples.{name}").main
    program = f"examples.{name.removesuffix('.__main__')}"
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m {program} ")
    assert main(["--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1


# --- tables -----------------------------------------------------------------------------------------

HEADER = (
    "method",
    "rated 5: NDCG@10",
    "rated 5: NDCG@10, new items",
    "stars: RMSE",
    "step",
    "runs",
)
LINES = [
    HEADER,
    ("sum", "0.1028 ± 0.0017", "0.1433 ± 0.0016***", "1.09 ± 0.01", "1.00", "3"),
    ("metabalance(relax_factor=1, place='representation')", "0.0999", "-", "1.03", "1.93", "15"),
]
NOTE = (
    "The mean of the rows above and of those below, * p < 0.05, with all weights 1. Nothing else. "
    * 4
)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_is_never_wider_than_the_terminal_and_nothing_is_cut(width):
    console = Console(file=io.StringIO(), width=width, markup=False)
    tables.show(console, LINES, "title", NOTE)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    cells = [cell.replace(" ", "") for line in LINES for cell in line]
    for name in cells if width == 200 else (LINES[0][4], "1.09", "15"):
        assert name in text.replace(" ", "")
    assert text.endswith("\n") and " ".join(text.split()).endswith(NOTE.strip())


def test_a_file_has_markdown_with_all_columns(capsys, tmp_path):
    tables.publish(tmp_path, "name", LINES, "title", NOTE, {"other.csv": "a,b\n"})
    text = capsys.readouterr().out
    assert (tmp_path / "name.md").read_text() == text[:-1]
    assert (tmp_path / "other.csv").read_text() == "a,b\n"
    lines = text.splitlines()
    assert lines[:4] == [
        "**title**",
        "",
        "| " + " | ".join(HEADER) + " |",
        "| --- |" + " ---: |" * 5,
    ]
    assert lines[5] == "| " + " | ".join(LINES[2]) + " |"
    note = lines[7:]
    assert max(map(len, note)) <= 82
    # A line of a paragraph must not begin an item of a list.
    assert not any(line.startswith(("* ", "1. ")) for line in note)
    assert " ".join(note).replace("\\", "").split() == NOTE.split()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("* a", r"\* a"), ("1. a", r"1\. a"), ("# a", r"\# a"), ("- a", r"\- a"), ("*** p", "*** p")],
)
def test_a_note_is_no_list(text, escaped):
    assert tables.markdown([("a",)], "t", text).endswith(f"\n\n{escaped}\n")


# --- the folder of results -------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from examples.studies.harness.command import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_program_is_refused_until_the_first_ends_however_it_ends(tmp_path, root, capsys):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    options = SimpleNamespace(out=out)
    ran: list[object] = []
    for end in ("killed", "finished"):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert holder.stdout and holder.stdin and holder.stdout.readline() == "held\n"
        assert command.run_command("program", lambda: options, ran.append) == 2
        assert ran == []
        error = capsys.readouterr().err
        assert "another program writes there" in error and error.count("\n") == 1
        if end == "killed":
            holder.kill()
        holder.communicate()
        assert command.run_command("program", lambda: options, ran.append) == 0
        assert ran == [options]
        ran.clear()
    assert [path.name for path in out.iterdir()] == [command.LOCK]


def test_a_lock_is_left_when_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), command.claimed(tmp_path):
        raise ZeroDivisionError
    with (
        command.claimed(tmp_path),
        pytest.raises(UserError, match="another program"),
        command.claimed(tmp_path),
    ):
        pytest.fail("claimed twice")


def test_a_folder_that_cannot_be_made_is_one_line_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    options = SimpleNamespace(out=tmp_path / "file" / "out")
    assert command.run_command("program", lambda: options, lambda _: pytest.fail("worked")) == 2
    error = capsys.readouterr().err
    assert error.startswith("program: error: ") and error.count("\n") == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_write_permission_is_refused_before_any_work(tmp_path, capsys):
    tmp_path.chmod(0o500)
    options = SimpleNamespace(out=tmp_path)
    assert command.run_command("program", lambda: options, lambda _: pytest.fail("worked")) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_disk_that_is_full_later_is_one_line(capsys):
    def work(_: object) -> None:
        raise OSError(28, "No space left on device", "runs/sum.npz")

    assert command.run_command("program", SimpleNamespace, work) == 2
    error = capsys.readouterr().err
    assert "No space left on device: 'runs/sum.npz'" in error and error.count("\n") == 1


# --- threads and names ------------------------------------------------------------------------------


def test_a_stopped_command_says_so_at_once_and_begins_nothing(capsys):
    stopping, began = threading.Event(), threading.Event()
    said, begun = [], []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            began.wait(10)
            raise KeyboardInterrupt
        began.set()
        stopping.wait(10)
        for _ in range(100):  # the line is there before this ends
            said.append(capsys.readouterr().err)
            if any(said):
                break
            time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        command.in_threads(work, range(99), 2, stopping)
    # Of two calls that wait, one may read the line and the other nothing.
    assert "".join(said) == "stopping: waiting for what is under way\n"
    assert len(begun) < 99


def test_results_are_in_order():
    def work(item: int) -> int:
        time.sleep(0.01 * (3 - item))
        return item**2

    assert command.in_threads(work, range(4), 3, threading.Event()) == [0, 1, 4, 9]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("metabalence", "did you mean 'metabalance'?"),
        ("PCGRAD", "did you mean 'pcgrad'?"),
        ("zzz", "choose from metabalance, pcgrad, NTK traces"),
        ("ntk trace", "did you mean 'NTK traces'?"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, hint):
    found = command.unknown("method", name, ["metabalance", "pcgrad", "NTK traces"])
    assert found == f"unknown method {name!r}; {hint}"
