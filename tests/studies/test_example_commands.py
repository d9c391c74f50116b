"""What the commands of the examples share: tables, errors, the folder of results, and threads."""

import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    "studies.benchmarks.growth",
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


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_table_is_never_wider_than_the_terminal_and_nothing_is_cut(width):
    text = tables.for_terminal(LINES, "title", NOTE, width, first=("rated 5: NDCG@10", "runs"))
    body, _, note = text.partition("The mean of")
    assert max(map(len, text.splitlines())) <= width
    assert " ".join(f"The mean of{note}".split()) == NOTE.strip()
    shown = [
        name for name in HEADER if name not in body.partition("Without ")[2].replace("\n", " ")
    ]
    for place, name in enumerate(HEADER):
        for line in LINES:
            if name in shown or place < 2:
                assert all(part in body for part in line[place].split() if len(part) < 18), line
    assert "0.1028 ± 0.0017" in body  # the target always has a place
    if width >= 80:
        assert "runs" in shown
    assert (width >= 120) == (shown == list(HEADER))


def test_a_label_is_broken_and_not_cut():
    label = LINES[2][0]
    text = tables.for_terminal([("method", "number"), (label, "1")], "title", "", 40)
    rows = text.split("─\n")[-1].splitlines()
    assert len(rows) > 2
    assert "".join(row.split("  ")[0] for row in rows[:-1]).replace(" ", "") == label.replace(
        " ", ""
    )


def test_a_file_has_markdown_with_all_columns(capsys):
    tables.show(LINES, "title", NOTE)
    lines = capsys.readouterr().out.splitlines()
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


def test_a_terminal_has_the_columns_that_fit(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    tables.show(LINES, "title", NOTE)
    shown = capsys.readouterr().out
    assert "|" not in shown and max(map(len, shown.splitlines())) <= 80
    assert "Without " in shown


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
    assert error.startswith("program: error: --out: cannot write to") and error.count("\n") == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        command.check_writable(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(
        command.tempfile,
        "TemporaryFile",
        lambda dir: open("/dev/full", "wb"),  # noqa: SIM115
    )
    with (
        pytest.raises(UserError, match=r"cannot write to .*No space left"),
        command.claimed(tmp_path),
    ):
        pytest.fail("worked")


def test_a_disk_that_is_full_later_is_one_line(capsys):
    def work(_: object) -> None:
        raise OSError(28, "No space left on device", "runs/sum.npz")

    assert command.run_command("program", SimpleNamespace, work) == 2
    error = capsys.readouterr().err
    assert "No space left on device: 'runs/sum.npz'" in error and error.count("\n") == 1


# --- threads and names ------------------------------------------------------------------------------


def test_a_stopped_command_says_at_once_what_it_waits_for(capsys):
    stopping, began = threading.Event(), threading.Event()
    said = []

    def work(name: str) -> None:
        if name == "stops":
            began.wait(10)
            raise KeyboardInterrupt
        if name == "queued":
            pytest.fail("began after the stop")
        began.set()
        stopping.wait(10)
        for _ in range(100):  # the line is there before this ends
            said.append(capsys.readouterr().err)
            if said[-1]:
                break
            time.sleep(0.05)

    names = ["long", "stops", "queued"]
    with pytest.raises(KeyboardInterrupt):
        command.in_threads(work, names, names, 2, stopping)
    assert said[-1] == "stopping: waiting for the part under way of long\n"


def test_results_are_in_order():
    def work(item: int) -> int:
        time.sleep(0.01 * (3 - item))
        return item**2

    assert command.in_threads(work, range(4), list("abcd"), 3, threading.Event()) == [0, 1, 4, 9]


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
