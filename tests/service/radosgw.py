"""A radosgw that the project's own script has started, and that tests kill and start again over what it stored."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Radosgw"]

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Radosgw:
    """The server of a folder of `radosgw-up`, on a port of loopback."""

    folder: Path
    port: int

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def _pids(self) -> list[str]:
        return (self.folder / "pids").read_text().split()

    def add_key(self, access_key: str, secret_key: str) -> None:
        """Let its user sign with this key, too."""
        self._administer("create", access_key, f"--secret-key={secret_key}")

    def remove_key(self, access_key: str) -> None:
        """Take no more requests that are signed with this key."""
        self._administer("rm", access_key)

    def _administer(self, action: str, access_key: str, *more: str) -> None:
        command = ["radosgw-admin", "key", action, "--uid=cbir", "--key-type=s3", f"--access-key={access_key}", *more]
        environment = {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=_PATIENCE_S)

    def kill(self) -> list[str]:
        """SIGKILL the gateway, not the disk behind it; returns the command that starts it again."""
        pid = self._pids[-1]
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        os.kill(int(pid), signal.SIGKILL)
        return command

    def start(self, command: list[str]) -> None:
        """Start it again, as a process that outlives this one and belongs to the folder, and wait until it answers."""
        detached = subprocess.run(
            ["bash", "-c", '"$@" </dev/null >/dev/null 2>&1 & echo $!', "radosgw", *command],
            env={**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        (self.folder / "pids").write_text("\n".join([*self._pids[:-1], detached.stdout.strip(), ""]))
        deadline = time.monotonic() + _PATIENCE_S
        while not self._answers():
            assert time.monotonic() < deadline, "radosgw does not start again"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
