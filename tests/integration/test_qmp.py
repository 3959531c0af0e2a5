"""The connection to QEMU's monitor, and what is refused before anything is touched."""

import contextlib
import os
import pwd
import secrets
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from guest import GuestDisk, machine
from moments import Chain, assert_clean
from servers import freeze, run

from backupfs.errors import ConnectError, Locked, NotFound, ProtocolError, SourceError, UsageError
from backupfs.sources import scratch
from backupfs.sources.machine import Moment, Recorders, Track
from backupfs.sources.monitor import Monitor, Refused, started
from backupfs.sources.qmp import QmpMachine, open_qmp
from backupfs.units import MiB


@pytest.fixture
def disk(tmp_path: Path) -> GuestDisk:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(8 * MiB))
    return GuestDisk(path, "qcow2", "vda")


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    (tmp_path / "scratch").mkdir()
    return Chain(tmp_path / "scratch")


def opened(path: str | Path, timeout_s: float = 20.0, disks: list[str] | None = None) -> QmpMachine:
    return open_qmp(str(path), disks, scratch="/var/tmp", timeout_s=timeout_s)


def test_no_socket_and_a_dead_one(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="no such socket"):
        opened(tmp_path / "none")
    with pytest.raises(ConnectError, match="too long"):
        opened(tmp_path / ("n" * 120))
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "dead"))
    with pytest.raises(ConnectError, match="QEMU has ended"):
        opened(tmp_path / "dead")
    (tmp_path / "file").touch()
    with pytest.raises(ConnectError):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"220 mail.example ESMTP\r\n", "not a QMP monitor"),
        (b'{"QMP": 7}\r\n', "not a QMP monitor"),
        (b"[]\n", "not a QMP monitor"),
        (b"{" * 100_000 + b"\n", "not a QMP monitor"),
        (b"", "another program is connected"),
    ],
)
def test_something_else_answers(tmp_path: Path, said: bytes, words: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(said)
                if not said:
                    peer.settimeout(20)
                    while peer.recv(100):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectError, match=words):
            opened(tmp_path / "s", timeout_s=1)
        thread.join()


def test_a_second_client_is_told_so(disk: GuestDisk) -> None:
    with machine([disk]) as m:
        first = opened(m.qmp_path)
        with pytest.raises(ConnectError, match="another program is connected"):
            opened(m.qmp_path, timeout_s=1)
        first.close()
        opened(m.qmp_path).close()


def test_which_disks(tmp_path: Path, disk: GuestDisk) -> None:
    fixed = tmp_path / "fixed"
    run("qemu-img", "create", "-q", "-f", "raw", fixed, "1M")
    options = ["-drive", f"if=none,id=cd,media=cdrom,file={fixed},format=raw", "-device", "ide-cd,drive=cd,id=cd0"]
    options += [
        "-device",
        "ide-cd,id=empty",
        "-blockdev",
        f"driver=raw,node-name=ro,file.driver=file,file.filename={fixed},read-only=on",
    ]
    options += ["-device", "virtio-blk-pci,drive=ro,id=vdr"]
    with machine([disk], *options) as m:
        found = opened(m.qmp_path)
        assert [(d.name, d.size, d.description) for d in found.disks] == [("vda", 8 * MiB, str(disk.path))]
        found.close()
        for name, error, words in (
            ("cd0", UsageError, "removable"),
            ("vdr", UsageError, "read-only"),
            ("empty", NotFound, "no disk 'empty' with a medium"),
            ("../vda", NotFound, "there are: cd0, vda, vdr"),
        ):
            with pytest.raises(error, match=words):
                opened(m.qmp_path, disks=[name])
    with machine([]) as m, pytest.raises(NotFound, match="has no disk"):
        opened(m.qmp_path)


def test_a_node_without_ids(tmp_path: Path, disk: GuestDisk, chain: Chain) -> None:
    node = f"driver=qcow2,node-name=root,file.driver=file,file.filename={disk.path}"
    with machine([], "-blockdev", node, "-device", "virtio-blk-pci,drive=root") as m:
        assert chain.take(m).keys() == {"root"}
        assert_clean(m, chain)


def test_a_monitor_that_hangs_and_comes_back(disk: GuestDisk) -> None:
    with machine([disk]) as m:
        monitor = Monitor(m.qmp_path, 0.5)
        assert monitor.version >= (5, 0, 0)
        assert monitor.pid == m.process.pid
        with pytest.raises(Refused, match="no-such-command"):
            monitor.execute("no-such-command")
        freeze(m.process.pid)
        with pytest.raises(ConnectError, match="did not answer query-status within"):
            monitor.execute("query-status")
        began = time.monotonic()
        with pytest.raises(ConnectError, match="did not answer"):
            monitor.execute("query-status")
        assert time.monotonic() - began < 0.4
        with pytest.raises(ConnectError, match="no greeting"):
            monitor.reconnect(0.5)
        os.kill(m.process.pid, signal.SIGCONT)
        monitor.reconnect(20)
        assert monitor.execute("query-status")["running"] is True
        monitor.close()
        monitor.close()
        with pytest.raises(ConnectError):
            monitor.execute("query-status")


def test_the_users_own_nbd_server(disk: GuestDisk, chain: Chain, tmp_path: Path) -> None:
    with machine([disk]) as m:
        address = {"type": "unix", "data": {"path": str(m.folder / "theirs")}}
        m.qmp("nbd-server-start", addr=address)
        with pytest.raises(SourceError, match="NBD server already running"):
            chain.take(m)
        assert (m.folder / "theirs").is_socket()
        m.qmp("nbd-server-stop")  # it still ran
        assert_clean(m, chain)


def test_anothers_job_and_bitmaps(disk: GuestDisk, chain: Chain, tmp_path: Path) -> None:
    with machine([disk]) as m:
        m.qmp("block-dirty-bitmap-add", node="vda-fmt", name="theirs", persistent=True)
        run("truncate", "-s", str(8 * MiB), tmp_path / "target")
        m.qmp("blockdev-add", driver="file", node_name="target", filename=str(tmp_path / "target"))
        m.qmp("blockdev-backup", device="vda-fmt", target="target", job_id="theirs", sync="none")
        with pytest.raises(SourceError, match="a backup job, 'theirs', which is not ours"):
            chain.take(m)
        m.qmp("block-job-cancel", device="theirs")
        while m.qmp("query-jobs"):
            time.sleep(0.01)
        chain.take(m)
        m.qmp("block-dirty-bitmap-remove", node="vda-fmt", name="theirs")
        m.qmp("blockdev-del", node_name="target")
        assert_clean(m, chain)


def test_a_backup_that_lives_is_let_alone(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk], "-qmp", "unix:second,server=on,wait=off") as m:
        m.write(disk, 0, 65536, 1)

        def another(moment: Moment) -> None:
            second = open_qmp(str(m.folder / "second"), None, scratch=str(chain.scratch), timeout_s=20)
            with pytest.raises(Locked, match="another backup of this machine is running"):
                second.begin(chain.next(), {"vda": Track(None, "")})
            second.close()
            m.write(disk, 0, 65536, 2)

        assert chain.take(m, another)["vda"][:65536] == b"\1" * 65536
        assert_clean(m, chain)


def test_cut_by_somebody(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        chain.take(m)
        m.write(disk, 0, 65536, 1)

        def cut(moment: Moment) -> None:
            for export in m.qmp("query-block-exports"):
                m.qmp("block-export-del", id=export["id"], mode="hard")

        with pytest.raises(ConnectError):
            chain.take(m, cut)
        assert_clean(m, chain)
        chain.take(m)
        assert chain.reasons["vda"] == ""
        assert_clean(m, chain)


def test_qemu_stands_still(disk: GuestDisk, chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    """A silent QEMU ends the backup within a few timeouts; when it goes on, the next backup clears up."""
    with machine([disk]) as m:
        chain.take(m)
        m.write(disk, 0, 65536, 1)
        began = time.monotonic()
        with pytest.raises(SourceError):
            chain.take(m, lambda moment: freeze(m.process.pid), timeout_s=1)
        assert time.monotonic() - began < 10
        assert "the next one will" in caplog.text
        os.kill(m.process.pid, signal.SIGCONT)
        m.write(disk, 65536, 65536, 2)
        chain.take(m)
        assert chain.reasons["vda"] == ""
        assert_clean(m, chain)


def test_a_point_that_was_published_and_never_closed(disk: GuestDisk, chain: Chain) -> None:
    """The new recorder is the manifest's then; the old one goes at the next backup."""
    with machine([disk]) as m:
        for k in range(3):
            m.write(disk, k * 65536, 65536, k + 1)
            chain.take(m)
            node = next(n for n in m.qmp("query-named-block-nodes") if n["node-name"] == "vda-fmt")
            (current,) = (b["name"] for b in node["dirty-bitmaps"])
            left = Recorders(chain.repository, chain.name, f"20250101T00000{k}Z").new
            m.qmp("block-dirty-bitmap-add", node="vda-fmt", name=left)
            m.qmp("block-dirty-bitmap-disable", node="vda-fmt", name=left)
            assert current == chain.recorders["vda"]
        chain.take(m)
        assert chain.reasons["vda"] == ""
        assert_clean(m, chain)


def test_a_stopped_recorder_is_not_trusted(disk: GuestDisk, chain: Chain) -> None:
    with machine([disk]) as m:
        chain.take(m)
        m.qmp("block-dirty-bitmap-disable", node="vda-fmt", name=chain.recorders["vda"])
        m.write(disk, 0, 65536, 1)
        chain.take(m)
        assert "was stopped, and nothing has recorded since" in chain.reasons["vda"]
        assert_clean(m, chain)


def test_qemu_of_another_user() -> None:
    """Root makes the scratch; QEMU, which has dropped its rights after it made its socket, has to get at it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    nobody = pwd.getpwnam("nobody").pw_uid
    with tempfile.TemporaryDirectory(prefix="bfs-test-") as name:  # nobody gets into pytest's own folders
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "scratch").mkdir()
        chain = Chain(folder / "scratch")
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "disk", str(8 * MiB))
        os.chown(folder / "disk", nobody, -1)
        with machine([GuestDisk(folder / "disk")], "-runas", "nobody") as m:
            assert f"\nUid:\t{nobody}\t" in Path(f"/proc/{m.process.pid}/status").read_text()

            def look(moment: Moment) -> None:
                (session,) = chain.scratch.iterdir()
                assert stat.S_IMODE(session.stat().st_mode) == 0o700
                assert session.stat().st_uid == nobody

            chain.take(m, look)
            assert_clean(m, chain)


def test_a_long_path_for_the_scratch(tmp_path: Path, disk: GuestDisk) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    chain = Chain(long, repository=secrets.token_hex(16))
    with machine([disk]) as m:
        chain.take(m)
        assert_clean(m, chain)
    assert [n for n in os.listdir("/tmp") if n.startswith(f"backupfs-{chain.repository[:8]}")] == []


def test_who_asks_whether_a_server_listens_waits_until_it_is_let_go(tmp_path: Path) -> None:
    """QEMU 7.2 hangs, and its guest with it, when its server is stopped before it has noticed that somebody hung up."""
    folder = scratch.Scratch(str(tmp_path), None)
    assert folder.serves() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(folder.socket)
        server.listen()
        let_go = threading.Event()

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(b"NBDMAGICIHAVEOPT\0\3")
                assert client.recv(1) == b""
                time.sleep(0.2)  # busy with its guest
                let_go.set()

        thread = threading.Thread(target=serve)
        thread.start()
        assert folder.serves() == folder.socket
        assert let_go.is_set()
        thread.join()
    with machine([]) as m:
        os.unlink(folder.socket)
        for _ in range(100):
            m.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": folder.socket}})
            assert folder.serves() == folder.socket
            m.qmp("nbd-server-stop")
        assert folder.serves() is None


def test_a_server_that_does_not_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_GOODBYE_S", 0.2)
    folder = scratch.Scratch(str(tmp_path), None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(folder.socket)
        server.listen()
        with pytest.raises(SourceError, match="did not end a connection"):
            folder.serves()
        server.accept()[0].close()

        def talk() -> None:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                while True:
                    client.send(b"x")

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(SourceError, match="did not end a connection"):
            folder.serves()
        thread.join()


@pytest.mark.parametrize(
    "answers",
    [
        {"query-block": [{"inserted": 3}]},
        {"query-jobs": [{"type": "backup"}]},
        {"query-jobs": 7},
        {"query-block-exports": [[]]},
        {"query-qmp-schema": [{"members": [3]}]},
        {"query-named-block-nodes": []},
    ],
    ids=str,
)
def test_qemu_talks_nonsense(
    disk: GuestDisk, chain: Chain, monkeypatch: pytest.MonkeyPatch, answers: dict[str, object]
) -> None:
    with machine([disk]) as m:
        with monkeypatch.context() as patch:
            execute = Monitor.execute

            def lie(monitor: Monitor, command: str, arguments: object = None) -> object:
                return answers[command] if command in answers else execute(monitor, command, arguments)  # type: ignore[arg-type]

            patch.setattr(Monitor, "execute", lie)
            with pytest.raises(ProtocolError):
                chain.take(m)
        assert_clean(m, chain)


def test_the_scratch_is_made_before_qemus_user_gets_its_folder(tmp_path: Path) -> None:
    """Or a link that lies in wait there would have root write where it points."""
    nobody = pwd.getpwnam("nobody").pw_uid
    with subprocess.Popen(["setpriv", f"--reuid={nobody}", "--clear-groups", "sleep", "100"]) as process:
        folder = scratch.make(str(tmp_path), "0" * 32, process.pid)
        try:
            assert os.stat(folder.path).st_uid == os.geteuid()
            folder.create_images({0: MiB}, nobody, 20.0)
            assert os.stat(folder.path).st_uid == os.geteuid()
            folder.hand_over(nobody)
            assert (
                os.stat(folder.path).st_uid == os.stat(folder.image(0)).st_uid == os.stat(folder.empty).st_uid == nobody
            )
        finally:
            folder.discard()
            process.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "fifo"])
def test_a_folder_that_somebody_planted_is_not_believed(disk: GuestDisk, chain: Chain, kind: str) -> None:
    """Anybody can make one in /var/tmp. It says here that the guest was stopped by a backup of ours."""
    planted = chain.scratch / "backupfs-01234567-89abcdef"
    planted.mkdir()
    (planted / "paused").touch()
    with machine([disk]) as m:
        if kind == "fifo":
            os.mkfifo(planted / "lock")
        else:
            (planted / "lock").write_text(f"{m.process.pid} {started(m.process.pid)}\n")
            os.chown(planted / "lock", pwd.getpwnam("nobody").pw_uid, -1)
        m.qmp("stop")
        chain.take(m)
        assert m.qmp("query-status")["status"] == "paused"
        assert sorted(p.name for p in planted.iterdir()) == ["lock", "paused"]


def test_a_machine_that_is_closed_closes_its_moment(disk: GuestDisk, chain: Chain) -> None:
    """A Ctrl-C may come before the caller has the moment in hand."""
    with machine([disk]) as m:
        chain.take(m)
        opened = open_qmp(m.qmp_path, None, scratch=str(chain.scratch), timeout_s=20.0)
        opened.begin(chain.next(), {"vda": Track(chain.recorders["vda"], "")})
        m.write(disk, 0, MiB, 1)
        opened.close()
        assert_clean(m, chain)
        chain.take(m)
        assert chain.reasons == {"vda": ""}
