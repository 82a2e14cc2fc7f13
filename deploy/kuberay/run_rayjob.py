"""Create the RayJob of a manifest and wait for its end: what the pod of the nightly CronJob runs.

Exit code 0 if the RayJob succeeded, 3 if it failed or is gone, anything else if that could not be found out. The RayJob
has the name of the Kubernetes Job that this pod belongs to, so that a pod which replaces this one finds it and waits
on, and it belongs to that Job, so that it is deleted with it.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SUCCEEDED, _FAILED = 0, 3
_POLL_S = 15.0


@dataclass(frozen=True)
class Api:
    """The RayJobs of a namespace, with the rights of a pod's service account."""

    url: str
    """Of the Kubernetes API."""
    account: Path = ACCOUNT

    def request(self, path: str = "", body: Any = None) -> Any:
        """GET, or POST of a body; urllib.error.HTTPError if the API refuses."""
        namespace, token = (self.account / "namespace").read_text(), (self.account / "token").read_text()
        request = urllib.request.Request(
            f"{self.url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        context = ssl.create_default_context(cafile=self.account / "ca.crt") if self.url.startswith("https") else None
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            return json.load(response)

    def create(self, rayjob: Any) -> None:
        """Create it, if there is none of that name."""
        try:
            self.request(body=rayjob)
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise


def named(manifest: Any, entrypoint: str, name: str, uid: str) -> Any:
    """The RayJob of a manifest with another command, named after a Kubernetes Job and owned by it."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "generateName"}
    metadata |= {"name": name, "ownerReferences": [owner]}
    return manifest | {"metadata": metadata, "spec": manifest["spec"] | {"entrypoint": entrypoint}}


def exit_code(status: Any) -> int | None:
    """Of a RayJob with this status; None if it has not ended."""
    deployment, job = status.get("jobDeploymentStatus"), status.get("jobStatus")
    if deployment in ("Failed", "ValidationFailed"):
        return _FAILED
    if deployment == "Complete":
        return _SUCCEEDED if job == "SUCCEEDED" else _FAILED
    return None


def wait(api: Api, name: str, poll_s: float = _POLL_S) -> int:
    """Look at a RayJob until it has ended; the API may be away for as long as it likes."""
    said = None
    while True:
        try:
            status = api.request(f"/{name}").get("status", {})
        except urllib.error.HTTPError as error:
            if error.code == 404:
                print(f"RayJob {name} is gone", flush=True)
                return _FAILED
            print(f"the Kubernetes API: {error}; trying again", flush=True)
        except OSError as error:
            print(f"the Kubernetes API: {error}; trying again", flush=True)
        else:
            state = f"{status.get('jobDeploymentStatus')} {status.get('jobStatus')} {status.get('message') or ''}"
            if state != said:
                print(f"RayJob {name}: {state}", flush=True)
                said = state
            code = exit_code(status)
            if code is not None:
                return code
        time.sleep(poll_s)


def main() -> int:
    """`run_rayjob.py MANIFEST ENTRYPOINT`; the Job's name and uid come from the environment."""
    manifest, entrypoint = sys.argv[1:]
    name = os.environ["JOB_NAME"]
    api = Api(f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}")
    try:
        api.create(named(yaml.safe_load(Path(manifest).read_text()), entrypoint, name, os.environ["JOB_UID"]))
    except OSError as error:
        print(f"cannot create RayJob {name}: {error}", file=sys.stderr)
        return 2
    return wait(api, name)


if __name__ == "__main__":
    sys.exit(main())
