"""Writing in one step: killed, full, locked, linked, by two at once; the old or the new is there,
whole.
"""

import errno
import fcntl
import os
import random
import resource
import signal
import stat
import sys
import time

import pytest
import torch
from samples import tokenizer

import funcattn as fa
from funcattn.checkpoints import CheckpointError, load_parts, save_parts
from funcattn.core import atomic
from funcattn.training import snapshots

pytestmark = pytest.mark.cpu("files and processes, whatever the device")
CONFIG = fa.Config(
    vocabulary=16, width=16, layers=1, heads=1, kv_heads=1, head_size=16, feed_forward=16
)
OLD, NEW = (fa.decoder(CONFIG).init(fa.key(seed)) for seed in (0, 1))
LORA = {seed: fa.lora(2, alpha=4.0 * seed)(fa.key(seed), OLD) for seed in (1, 2)}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(fa.tree.leaves(a), fa.tree.leaves(b), strict=True))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_child(f, *, killed_at=None, exchange=True, seconds=None):
    """Run f in a child, which is killed before its event of this number or after a time; whether it
    was.
    """
    pid = os.fork()
    if not pid:
        count = [0]

        def hook(event, arguments):
            if killed_at is not None and event.startswith(
                ("open", "os.", "shutil.", "ctypes.call", "fcntl.")
            ):
                count[0] += 1
                if count[0] == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        if not exchange:
            atomic.exchange = lambda a, b: False
        sys.addaudithook(hook)
        try:
            f()
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def killed_everywhere(f, check, **options):
    """f is killed before each thing that it asks of the file system, one after the other; then it
    may end.
    """
    number = 1
    while in_child(f, killed_at=number, **options):
        check()
        number += 1
    assert number > 10, "it asks for more than that"
    check()


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("tokenizer", "snapshot", "parts")]


@pytest.mark.parametrize("kind", ["model", "adapter", *SLOW])
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new(tmp_path, kind):
    place = tmp_path / "a"

    def saved(new):
        if kind == "model":
            fa.save(place, CONFIG, NEW if new else OLD, shard_size=2000 if new else 2**30)
        elif kind == "adapter":
            fa.save_lora(place, LORA[1 + new])
        elif kind == "parts":
            save_parts(place, NEW if new else OLD)
        elif kind == "snapshot":
            snapshots.write(tmp_path, 1, NEW if new else OLD, {"new": new})
        else:
            ours = tokenizer()
            type(ours)(ours.backend, (0,) if new else (1,), f"{new}", {"bos_token": f"{new}"}).save(
                place
            )

    def check():
        if kind == "model":
            found = fa.load(place).params
            assert same(found, OLD) or same(found, NEW)
        elif kind == "adapter":
            found = fa.load_lora(place, OLD)
            assert same(found, LORA[1]) or same(found, LORA[2])
        elif kind == "parts":
            found = load_parts(place, OLD)
            assert same(found, OLD) or same(found, NEW)
        elif kind == "snapshot":
            found, run = snapshots.read(tmp_path, 1, OLD)
            assert same(found, NEW if run["new"] else OLD)
        else:
            said = {"False" in (place / name).read_text() for name in ("tokenizer_config.json",)}
            said |= {"1" in (place / "generation_config.json").read_text()}
            assert len(said) == 1

    saved(new=False)
    if kind in ("adapter", "tokenizer"):
        (place / "README.md").write_text("mine")
    killed_everywhere(lambda: saved(new=True), check)
    saved(new=True)
    assert names(tmp_path) == ["step-00000001" if kind == "snapshot" else "a"], (
        "what the killed saves left is still there"
    )
    if kind in ("adapter", "tokenizer"):
        assert (place / "README.md").read_text() == "mine"
    if kind == "model":
        saved(new=False)
        assert names(place) == ["config.json", "model.safetensors"]  # and no shard of the other


def test_without_an_exchange_the_next_save_puts_back_what_was_there(tmp_path):
    fa.save(tmp_path / "m", CONFIG, OLD)
    number = 1
    while in_child(lambda: fa.save(tmp_path / "m", CONFIG, NEW), killed_at=number, exchange=False):
        number += 1
        atomic.sweep(tmp_path, "m".__eq__)
        found = fa.load(tmp_path / "m").params
        assert same(found, OLD) or same(found, NEW)
        assert names(tmp_path) == ["m"]
    assert number > 10


@pytest.mark.parametrize(
    "inside",
    ["folder", *(pytest.param(case, marks=pytest.mark.slow) for case in ("no exchange", "here"))],
)
def test_files_that_agree_are_never_mixed_where_no_exchange_can_be(tmp_path, inside, monkeypatch):
    place = tmp_path / "a"
    fa.save_lora(place, LORA[1])
    (place / "README.md").write_text("mine")
    if inside == "folder":
        (place / "runs").mkdir()
    if inside == "here":
        monkeypatch.chdir(place)

    def check():
        try:
            found = fa.load_lora(place, OLD)
        except CheckpointError:
            return
        assert same(found, LORA[1]) or same(found, LORA[2])

    killed_everywhere(lambda: fa.save_lora(place, LORA[2]), check, exchange=inside != "no exchange")
    fa.save_lora(place, LORA[2])
    assert same(fa.load_lora(place, OLD), LORA[2])
    assert (place / "README.md").read_text() == "mine"
    mine = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        *(["runs"] if inside == "folder" else []),
    }
    assert set(names(place)) == mine
    assert names(tmp_path) == ["a"]


def killed_at_random(tmp_path, kills):
    place, chance, saves = tmp_path / "m", random.Random(0), 0
    fa.save(place, CONFIG, OLD)

    def forever():
        for turn in range(10**6):
            fa.save(place, CONFIG, (NEW, OLD)[turn % 2], shard_size=(2000, 2**30)[turn % 2])

    for _ in range(kills):
        assert in_child(forever, seconds=chance.uniform(0.001, 0.12))
        found = fa.load(place).params
        assert same(found, OLD) or same(found, NEW)
        saves += same(found, NEW)
        # what one killed save left, since each sweeps before it writes
        assert len(names(tmp_path)) <= 2
    fa.save(place, CONFIG, OLD)
    assert names(tmp_path) == ["m"]
    return saves


def test_a_save_that_is_killed_at_random_leaves_a_whole_folder(tmp_path):
    killed_at_random(tmp_path, 20)


@pytest.mark.slow
def test_two_hundred_and_fifty_kills_leave_a_whole_folder(tmp_path):
    assert 0 < killed_at_random(tmp_path, 250) < 250  # both were found


def test_a_draft_of_a_process_that_lives_stays(tmp_path):
    ready, end = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        with atomic.folder(tmp_path / "m") as draft:
            (draft / "begun").write_text("")
            os.write(ready[1], b".")
            os.read(end[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    fa.save(tmp_path / "m", CONFIG, OLD)
    drafts = [path for path in tmp_path.iterdir() if atomic.drafted(path.name) == "m"]
    assert [names(path) for path in drafts] == [["begun"]]
    os.write(end[1], b".")
    assert os.waitpid(pid, 0)[1] == 0
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "m") == ["begun"]


MARK = "0123456789abcdef" * 2


def test_only_drafts_of_this_name_and_this_user_are_swept(tmp_path, monkeypatch):
    mine = [".m.new-backup", f".other.new-{MARK}", f"m.new-{MARK}", f".m.new-{MARK}0", ".m.cfg"]
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / f".m.new-{MARK[::-1]}").symlink_to(tmp_path / "precious")
    (tmp_path / f".m.old-{MARK}").mkdir()  # of a version before
    os.mkfifo(tmp_path / f".m.new-{MARK}")
    fa.save(tmp_path / "m", CONFIG, OLD)
    kept = {*mine, "precious", "m", f".m.new-{MARK[::-1]}", f".m.new-{MARK}"}
    assert set(names(tmp_path)) - {f".m.old-{MARK}"} == kept
    (tmp_path / f".m.new-{MARK}").unlink()
    (tmp_path / f".m.new-{MARK}").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        fa.save(tmp_path / "m", CONFIG, OLD)
    assert f".m.new-{MARK}" in names(tmp_path), "of another user"
    fa.save(tmp_path / "m", CONFIG, OLD)
    assert set(names(tmp_path)) == kept - {f".m.new-{MARK}"}


def test_without_locks_only_an_old_draft_is_swept(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    left = tmp_path / f".m.new-{MARK}"
    left.mkdir()
    fa.save(tmp_path / "m", CONFIG, OLD)
    assert names(tmp_path) == [left.name, "m"]
    os.utime(left, (time.time() - 2 * atomic.DAY,) * 2)
    fa.save(tmp_path / "m", CONFIG, OLD)
    assert names(tmp_path) == ["m"]


def test_a_folder_keeps_its_mode_and_loses_no_file_that_came_meanwhile(tmp_path):
    place = tmp_path / "a"
    fa.save_lora(place, LORA[1])
    place.chmod(0o770)
    (place / "README.md").write_text("mine")
    (place / "link").symlink_to("README.md")
    with atomic.files(place, last="adapter_config.json") as draft:
        (draft / "adapter_config.json").write_text("{}")
        (place / "log.txt").write_text("meanwhile")
    assert stat.S_IMODE(place.stat().st_mode) == 0o770
    assert names(place) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "link",
        "log.txt",
    ]
    assert (place / "link").is_symlink()
    assert (place / "log.txt").read_text() == "meanwhile"


def test_a_file_is_replaced_in_one_step_and_through_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")

    def fails():
        with atomic.file(tmp_path / "link") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert (tmp_path / "real").read_text() == "old"
    with atomic.file(tmp_path / "link") as draft:
        draft.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]
    os.mkfifo(tmp_path / "pipe")
    with atomic.file(tmp_path / "pipe") as draft:
        assert draft == tmp_path / "pipe"  # written to as it is


SAVES = {
    "save": lambda place: fa.save(place, CONFIG, OLD),
    "save_lora": lambda place: fa.save_lora(place, LORA[1]),
    "save_parts": lambda place: save_parts(place, OLD),
    "Tokenizer.save": lambda place: tokenizer().save(place),
    "fit": lambda place: snapshots.write(place, 1, OLD, {}),
}


def in_child_without(limit, f):
    """What f raised in a child whose files may have so many bytes."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        told = ""
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            f()
        except BaseException as error:
            told = f"{type(error).__name__} {error}"
        os.write(write, told.encode()[:2000])
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.parametrize("name", SAVES)
def test_a_place_without_room_or_with_too_long_a_name_is_one_sentence(tmp_path, name):
    save = SAVES[name]
    save(tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = in_child_without(200, lambda: save(tmp_path / "m"))
    assert told.startswith("CheckpointError ")
    assert "\n" not in told
    assert str(tmp_path / "m") in told
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for place in (tmp_path / ("a" * 240), tmp_path / ("a" * 300)):
        if name != "fit" or len(place.name) > 255:
            with pytest.raises(CheckpointError, match=os.strerror(errno.ENAMETOOLONG)):
                save(place)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(CheckpointError, match=r"can be written|should be a folder"):
            save(place)
    assert names(tmp_path) == ["file", "m"]
