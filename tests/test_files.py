"""Output files: they go to the right place and are complete or absent, and no process removes the file of another."""

from __future__ import annotations

import errno
import importlib.util
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from conftest import REPOSITORY

from data.attack import keep_asset
from data.sets import AttackContext, RawData
from utils import files
from utils.errors import UserError
from utils.files import new_folder, remove_leftovers, write_atomically, write_text
from utils.reporting import plots


def failing(number: int) -> Callable[..., Any]:
    """Return a function that fails with a system error for any arguments."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Return a process that runs the code in the repository and has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process as `kill -9` does, and wait for its end."""
    process.kill()
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    """A file that only its owner may read does not become readable for others when it is written again."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    path.chmod(0o600)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "new"


def test_a_text_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Bytes of file names that are not UTF-8 are written as they are."""
    write_text(tmp_path / "a.txt", os.fsdecode(b"run \xff"))
    assert (tmp_path / "a.txt").read_bytes() == b"run \xff"


def test_whether_a_file_can_be_written_is_known_before(tmp_path: Path) -> None:
    """The check makes the folder, and leaves neither a file nor a change of an earlier one."""
    files.check_writable(tmp_path / "new" / "a.csv")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a.csv", tmp_path, Path("/proc/a.csv")):
        with pytest.raises(UserError, match=r"cannot be written|is a folder"):
            files.check_writable(path)
    files.check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_to_a_link_is_a_link_to_the_file(tmp_path: Path) -> None:
    """A hard link to a symbolic one keeps the contents when the file is replaced."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "symbolic").symlink_to(tmp_path / "file")
    assert files.link(tmp_path / "symbolic", tmp_path / "hard")
    write_text(tmp_path / "symbolic", "new")
    assert (tmp_path / "hard").read_text() == "old" and (tmp_path / "file").read_text() == "new"


def test_a_rename_is_on_disk_before_writing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contents are synchronized before the rename, the folder after it: a power failure leaves the old or the new file."""
    order, fsync, replace = [], os.fsync, os.replace

    def note(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda one, two: (order.append("rename"), replace(one, two)))
    write_text(tmp_path / "a.txt", "text")
    assert order == ["file", "rename", "folder"]


# -- Where outputs go --------------------------------------------------------------------------------------------------


def test_a_named_pipe_is_written_into(tmp_path: Path) -> None:
    """The reader of a named pipe gets the output, and the pipe remains a pipe."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_text(pipe, "labels")
    reader.join(10)
    assert got == [b"labels"] and stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_written_into(tmp_path: Path) -> None:
    """A device that is given as the output file remains a device."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError as error:
        pytest.skip(f"no device can be made here: {error.strerror}")
    write_text(device, "labels")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert list(tmp_path.iterdir()) == [device]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    """Output to a link goes to its target, which is replaced or created; the link remains."""
    target, link = tmp_path / "far" / "labels.csv", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link.symlink_to("far/labels.csv")
    before = target.stat().st_ino if there else None
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_ino != before
    assert list(target.parent.iterdir()) == [target]


def test_output_to_the_own_standard_output_stays_in_order(tmp_path: Path) -> None:
    """`--out /dev/stdout > file` puts the output between the lines that the program prints before and after it."""
    code = """
import sys
from pathlib import Path
from utils.files import write_text
print("before")
write_text(Path(sys.argv[1]), "labels\\n")
print("after")
"""
    with open(tmp_path / "all.txt", "wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "all.txt")],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=file,
            timeout=60,
        )
    assert done.returncode == 0
    assert (tmp_path / "all.txt").read_text() == "before\nlabels\nafter\n"


def test_a_picture_goes_where_every_output_goes(tmp_path: Path) -> None:
    """The plot of `utils.compare --plot` follows links and needs no suffix; a folder is refused in one line."""
    history = [{"epoch": 0, "stage": "undefended", "defense": "none", "clean_accuracy": 0.5, "attack_success_rate": 0.1}]
    (tmp_path / "link").symlink_to("figure")
    plots.draw_comparison(tmp_path / "link", [("ASD", [history])])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "figure").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="is a folder"):
        plots.draw_comparison(tmp_path, [("ASD", [history])])


def test_a_folder_is_refused_and_a_name_in_it_works(tmp_path: Path) -> None:
    """An existing folder as output is refused in one line; following its advice gives the file."""
    with pytest.raises(UserError) as caught:
        write_text(tmp_path, "labels")
    assert str(caught.value).startswith(f"{tmp_path}: is a folder: ")
    write_text(tmp_path / "labels.csv", "labels")
    assert (tmp_path / "labels.csv").read_text() == "labels"


def test_py_refuses_a_folder_before_it_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test.py --images D --out FOLDER` ends at once with a file name that would work."""
    spec = importlib.util.spec_from_file_location("script_test", REPOSITORY / "test.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["test.py", "--images", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(UserError) as caught:
        script.main()
    line = str(caught.value)
    assert line.startswith(f"--out {tmp_path}: is a folder") and "--resume" not in line
    advised = Path(line.rpartition("--out ")[2])
    write_text(advised, "labels")
    assert advised.parent == tmp_path and advised.is_file()


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "writable")])
def test_what_cannot_be_written_can_be_once_the_advice_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """The error names file, cause and remedy; after the remedy the same call succeeds."""
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(os, "open", failing(number))
        write_text(tmp_path / "a.txt", "a")
    assert remedy in str(caught.value) and os.strerror(number) in str(caught.value)
    write_text(tmp_path / "a.txt", "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# -- Several names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_two_names_of_the_same_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Both names have the contents, the additional one first; a later write to one does not change the other."""
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    latest, best = tmp_path / "latest", tmp_path / "best"
    best.write_text("old")
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b))[1])
    write_atomically(latest, lambda file: file.write(b"one"), [best])
    assert order == ["best", "latest"]
    assert latest.read_text() == best.read_text() == "one"
    assert latest.samefile(best) == links
    write_atomically(latest, lambda file: file.write(b"two"))
    assert (latest.read_text(), best.read_text()) == ("two", "one")
    write_atomically(latest, lambda file: file.write(b"three"), [best])
    assert latest.read_text() == best.read_text() == "three"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest"]


def test_the_error_names_the_second_file_if_that_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second name fails, the error names it, and the first one is the old file."""
    (tmp_path / "latest").write_text("old")
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match="best: is a folder"):
        write_atomically(tmp_path / "latest", lambda file: file.write(b"new"), [tmp_path / "best"])
    assert (tmp_path / "latest").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest"]


# -- Live writers and leftovers ----------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from utils.files import new_folder, write_atomically

def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

if sys.argv[2] == "file":
    write_atomically(Path(sys.argv[1]), write)
else:
    with new_folder(Path(sys.argv[1])) as folder, open(folder / "half", "wb") as file:
        write(file)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_living_writer_is_left_alone_and_a_killed_one_cleaned_up(tmp_path: Path, kind: str) -> None:
    """The temporary file of an active process stays; after a kill, the next write of that name removes it."""
    out = tmp_path / "set"

    def write_once_more() -> None:
        if kind == "file":
            write_text(out, "mine")
        else:
            with new_folder(out) as folder:
                (folder / "a").write_text("mine")

    process = started(WRITER, out, kind)
    try:
        (part,) = tmp_path.glob(".set.*.part")
        remove_leftovers(tmp_path)
        write_once_more()
        assert part.exists()
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        end(process)
    if kind == "folder":
        (out / "a").unlink()
    (tmp_path / ".other.txt.part").write_text("not of this project")
    write_once_more()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.txt.part", "set"]


def leftover(folder: Path, origin: str, age: float) -> Path:
    """Make a temporary file of a writer of that boot, with that age in seconds."""
    part = folder / f".a.txt.{origin}.part"
    part.write_bytes(b"half")
    os.utime(part, (time.time() - age, time.time() - age))
    return part


def test_parts_of_other_computers_are_judged_by_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared disk the locks of other computers may be invisible: their temporary files stay for a day after the last
    change, and so does every one on disks without locks. Leftovers of this computer are removed at once."""
    other, here = "0123456789ab-0123456789ab", f"{files.boot()}-0123456789ab"
    if files.boot() == files.UNKNOWN:
        pytest.skip("this system does not name its boots")
    young = leftover(tmp_path, other, 3600)
    remove_leftovers(tmp_path)
    assert young.exists()
    leftover(tmp_path, other, 25 * 3600)
    own = leftover(tmp_path, here, 0)
    former = leftover(tmp_path, "4711", 25 * 3600)  # as earlier versions named them
    remove_leftovers(tmp_path)
    assert not young.exists() and not own.exists() and not former.exists()

    own, old = leftover(tmp_path, here, 3600), leftover(tmp_path, here.replace("-0", "-1"), 25 * 3600)
    monkeypatch.setattr(files.fcntl, "flock", failing(errno.ENOLCK))
    remove_leftovers(tmp_path)
    assert own.exists() and not old.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_disk_that_cannot_lock_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    """If locks fail or do not exist, files and folders can still be written."""
    if number is None:
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", failing(number))
    write_text(tmp_path / "a.txt", "a")
    with new_folder(tmp_path / "set") as folder:
        (folder / "b").write_text("b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "set"]


def test_a_part_that_was_taken_before_it_was_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process removes a temporary file before it is locked, the writer makes a new one."""
    try_lock, taken = files.try_lock, []

    def late(descriptor: int) -> bool:
        if not taken:
            taken.extend(tmp_path.glob(".*.part"))
            taken[0].unlink()
        return try_lock(descriptor)

    monkeypatch.setattr(files, "try_lock", late)
    write_text(tmp_path / "a.txt", "a")
    assert taken and (tmp_path / "a.txt").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Two processes that write the same name simultaneously both succeed, even with equal process numbers; one of the files
    remains."""
    path, meet, failed = tmp_path / "a.txt", threading.Barrier(2), []

    def write(file: IO[bytes]) -> None:
        file.write(b"same")
        file.flush()
        meet.wait(10)

    def run() -> None:
        try:
            write_atomically(path, write)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and path.read_bytes() == b"same" and list(tmp_path.iterdir()) == [path]


def test_two_runs_make_the_same_asset(tmp_path: Path) -> None:
    """Of two runs that need an asset simultaneously one trains it, and both get it; leftovers of a killed run are removed;
    one file remains, beside that of the lock."""
    raw = RawData(
        np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64), np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1), ("a",)
    )
    context = AttackContext(raw, 0, 1, 0, tmp_path / "assets")
    context.assets.mkdir()
    (context.assets / f".mask-old.npz.{files.boot()}-0123456789ab.part").write_bytes(b"half")
    made, got = [], []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        time.sleep(0.2)
        return {"weights": np.arange(100_000)}

    threads = [threading.Thread(target=lambda: got.append(keep_asset(context, "mask", {"seed": 1}, make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and len(made) == 1
    (path,) = (path for path in context.assets.iterdir() if path.suffix != ".lock")
    kept = keep_asset(context, "mask", {"seed": 1}, lambda: pytest.fail("it is there already"))
    assert path.name.startswith("mask-") and np.array_equal(kept["weights"], np.arange(100_000))
