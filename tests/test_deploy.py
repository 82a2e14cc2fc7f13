"""What deploy/ holds fits the schemas of Kubernetes and KubeRay, the command line, the configurations, and itself.

Nothing here asks a cluster or a registry: the schemas of Kubernetes come with a package, those of KubeRay lie beside
the manifests.
"""

import configparser
import contextlib
import http.server
import importlib.util
import io
import json
import re
import shlex
import sys
import threading
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource
from starlette.routing import Route

from cbir.config import Pool, load_config
from pipelines.cli import app
from pipelines.serve_app import Arguments
from pipelines.service import Service, Settings
from tests.conftest import PROJECT
from tests.pipelines.test_cli import cbir

DEPLOY = PROJECT / "deploy"
KUBERAY = DEPLOY / "kuberay"
CONFIG = PROJECT / "configs" / "cluster.yaml"
MANIFESTS = ["accounts.yaml", "nightly.yaml", "raycronjob.yaml", "rayjob.yaml", "rayservice.yaml"]
CONTAINERFILES = sorted((DEPLOY / "containers").glob("*.Containerfile"))
KUBERNETES = ["1.31", "1.37"]
UNITS = {"m": Decimal("0.001"), "": Decimal(1), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def one(name: str, kind: str, called: str | None = None) -> Any:
    """The document of a manifest with this kind, and name."""
    found = [
        document
        for document in documents(name)
        if document["kind"] == kind and called in (None, document["metadata"].get("name"))
    ]
    assert len(found) == 1
    return found[0]


def pods(node: Any) -> Iterator[Any]:
    """All pod templates below a node."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    if isinstance(node, dict) and "containers" in node.get("spec", {}):
        yield node
    for child in children:
        yield from pods(child)


def quantity(text: str) -> float:
    """A number of Kubernetes, such as 500m or 16Gi."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return float(Decimal(number) * UNITS[unit])


# Schemas


def check_schema(document: Any, version: str) -> None:
    """ValidationError if Kubernetes of this version, or KubeRay, knows a field of the document not or otherwise."""
    if not document["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(document, version, strict=True)
        return
    schema = yaml.safe_load((KUBERAY / "schemas" / "kuberay-1.7.0.yaml").read_text())
    folder = files(kubernetes_validate) / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    kubernetes = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    Draft202012Validator(schema, registry=kubernetes @ Registry()).validate(document)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas(name: str, version: str) -> None:
    for document in documents(name):
        check_schema(document, version)


@pytest.mark.parametrize(
    ("name", "kind", "path", "value"),
    [
        ("rayjob.yaml", "RayJob", "spec.shutdownAfterJobFinish", True),
        ("rayjob.yaml", "RayJob", "spec.backoffLimit", "2"),
        ("rayjob.yaml", "RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec.serviceAcountName", "cbir"),
        ("rayjob.yaml", "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.ports", "8000"),
        ("raycronjob.yaml", "RayCronJob", "spec.concurrencyPolicy", "Forbid"),
        ("rayservice.yaml", "RayService", "spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0),
        ("nightly.yaml", "CronJob", "spec.concurrencyPolicies", "Forbid"),
        ("nightly.yaml", "CronJob", "spec.jobTemplate.spec.template.spec.containers.0.securityContext", "none"),
    ],
)
def test_mistakes_do_not_fit_the_schemas(name: str, kind: str, path: str, value: Any) -> None:
    document = deepcopy(one(name, kind))
    *parents, last = path.split(".")
    place = document
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    with pytest.raises(ValidationError):
        check_schema(document, KUBERNETES[-1])


def test_every_manifest_is_checked_and_applied() -> None:
    assert sorted(path.name for path in KUBERAY.glob("*.yaml")) == sorted([*MANIFESTS, "kustomization.yaml"])
    kustomization = documents("kustomization.yaml")[0]
    generated = [file for generator in kustomization["configMapGenerator"] for file in generator["files"]]
    for name in [*kustomization["resources"], *generated]:
        assert (KUBERAY / name).is_file()
    # By hand: the first build, and the schedule that replaces the nightly CronJob.
    assert set(MANIFESTS) - set(kustomization["resources"]) == {"rayjob.yaml", "raycronjob.yaml"}


# Commands and configurations


def commands() -> dict[str, str]:
    """Where it stands -> a command line that begins with the program."""
    [nightly] = pods(one("nightly.yaml", "CronJob"))
    cron = (DEPLOY / "cron" / "cbir.cron").read_text()
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(DEPLOY / "cron" / "cbir-nightly.service")
    found = {
        "rayjob": one("rayjob.yaml", "RayJob")["spec"]["entrypoint"],
        "raycronjob": one("raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"]["entrypoint"],
        "nightly": nightly["spec"]["containers"][0]["args"][0],
        "cron": re.findall(r"/opt/cbir/bin/cbir [^>]*", cron)[0],
        "systemd": unit["Service"]["ExecStart"],
    }
    page = (DEPLOY / "README.md").read_text()
    return found | {f"README: {line}": line for line in re.findall(r"^    (cbir .*)$", page, re.MULTILINE)}


COMMANDS = commands()


@pytest.mark.parametrize("place", COMMANDS)
def test_commands_and_their_options_exist(place: str) -> None:
    program, name, *arguments = shlex.split(COMMANDS[place], comments=True)
    group = typer.main.get_command(app)
    assert Path(program).name == "cbir"
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


def test_an_option_that_does_not_exist_is_found() -> None:
    outcome = cbir("index", "/config/cluster.yaml", "--sets", "ray=auto")
    assert outcome.code == 2
    assert "No such option: --sets" in outcome.err


@pytest.mark.parametrize("place", ["rayjob", "raycronjob", "nightly"])
def test_the_configuration_is_where_the_command_looks_and_its_settings_are_valid(place: str) -> None:
    _, _, path, *options = shlex.split(COMMANDS[place])
    load_config(CONFIG, [value for flag, value in zip(options[::2], options[1::2], strict=True) if flag == "--set"])
    kustomization = documents("kustomization.yaml")[0]
    maps = {
        entry["name"]: [Path(file).name for file in entry["files"]] for entry in kustomization["configMapGenerator"]
    }
    for pod in pods(one("rayjob.yaml", "RayJob")):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert Path(path).name in maps[volumes[mounts[str(Path(path).parent)]]["configMap"]["name"]]


def test_the_nightly_job_finds_its_files() -> None:
    [pod] = pods(one("nightly.yaml", "CronJob"))
    [container], [volume] = pod["spec"]["containers"], pod["spec"]["volumes"]
    generated = documents("kustomization.yaml")[0]["configMapGenerator"]
    [entry] = [entry for entry in generated if entry["name"] == volume["configMap"]["name"]]
    folder = container["volumeMounts"][0]["mountPath"]
    assert container["command"] == ["python", f"{folder}/run_rayjob.py", f"{folder}/rayjob.yaml"]
    assert sorted(entry["files"]) == ["rayjob.yaml", "run_rayjob.py"]


def test_a_failed_night_is_told_from_a_lost_pod(run_rayjob: ModuleType) -> None:
    spec = one("nightly.yaml", "CronJob")["spec"]
    [pod] = pods(spec)
    rule = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
    failed = run_rayjob.exit_code({"jobDeploymentStatus": "Failed"})
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == pod["spec"]["containers"][0]["name"]
    assert rule["onExitCodes"]["values"] == [failed]
    assert failed not in (0, 1, 2), "Python itself ends with 1 or 2"
    assert spec["concurrencyPolicy"] == "Forbid"


def test_the_newer_schedule_makes_the_same_job() -> None:
    spec = one("raycronjob.yaml", "RayCronJob")["spec"]
    nightly = one("nightly.yaml", "CronJob")["spec"]
    job = one("rayjob.yaml", "RayJob")["spec"]
    assert spec["jobTemplate"] == job | {"entrypoint": COMMANDS["nightly"]}
    assert (spec["schedule"], spec["timeZone"]) == (nightly["schedule"], nightly["timeZone"])


def test_the_page_names_files_that_exist() -> None:
    page = (DEPLOY / "README.md").read_text()
    named = {
        *re.findall(r"\b(?:deploy|configs)/[\w./-]*\w", page),
        *re.findall(r"`((?:kuberay|cron|containers)/[^`]+)`", page),
    }
    assert "deploy/kuberay/rayjob.yaml" in named
    for name in named:
        assert (PROJECT / name).exists() or (DEPLOY / name).exists(), name


# Resources


def room(group: Any, pool: Pool) -> int:
    """How many workers of a pool the pods of a group have room for, as Ray counts."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    per_pod = [quantity(limits["cpu"]) / pool.cpus]
    if pool.gpus:
        per_pod.append(quantity(limits.get("nvidia.com/gpu", "0")) / pool.gpus)
    if pool.memory_gb:
        store = float(group["rayStartParams"]["object-store-memory"])
        per_pod.append((quantity(limits["memory"]) - store) / (pool.memory_gb * 1e9))
    return int(min(per_pod)) * int(group["replicas"])


@pytest.mark.parametrize("name", ["extract", "build"])
def test_the_worker_groups_have_room_for_exactly_the_pools(name: str) -> None:
    config = load_config(CONFIG)
    pool: Pool = getattr(config.pools, name)
    [group] = [
        group
        for group in one("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        if group["groupName"] == name
    ]
    assert room(group, pool) == (pool.workers or config.workers)
    assert group["template"]["spec"]["containers"][0]["image"].endswith("-gpu") == bool(pool.gpus)
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_requests_are_limits() -> None:
    """So that Ray, which counts limits, never gives away what the pod was not given."""
    for name, kind in [("rayjob.yaml", "RayJob"), ("rayservice.yaml", "RayService")]:
        for pod in pods(one(name, kind)):
            resources = pod["spec"]["containers"][0]["resources"]
            assert resources["limits"].items() <= resources["requests"].items()


def test_the_query_pool_fits_its_pods() -> None:
    spec = one("rayservice.yaml", "RayService")["spec"]
    serve = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    [application] = serve.applications
    [service] = application.deployments
    arguments = Arguments.model_validate(application.args)
    groups = {group["groupName"]: group for group in spec["rayClusterConfig"]["workerGroupSpecs"]}
    assert isinstance(service.num_replicas, int)
    actors = service.num_replicas * arguments.actors * arguments.replicas
    assert room(groups["query"], Pool(cpus=1)) == actors
    assert groups["ingress"]["replicas"] == service.num_replicas
    assert groups["ingress"]["rayStartParams"]["num-cpus"] == "0"
    assert yaml.safe_load(json.loads(groups["ingress"]["rayStartParams"]["resources"])) == {"ingress": 1}
    assert arguments.store == load_config(CONFIG).store
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(sys.modules[module], function))
    assert service.name == "Service"


def test_probes_scrapes_services_and_budgets_find_the_service() -> None:
    spec = one("rayservice.yaml", "RayService")["spec"]
    port = yaml.safe_load(spec["serveConfigV2"])["http_options"]["port"]
    groups = {group["groupName"]: group for group in spec["rayClusterConfig"]["workerGroupSpecs"]}
    pod = groups["ingress"]["template"]
    [container] = pod["spec"]["containers"]
    paths = {route.path for route in Service(None, Settings()).app.routes if isinstance(route, Route)}  # type: ignore[arg-type]
    assert container["readinessProbe"]["httpGet"]["path"] in paths
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    notes = pod["metadata"]["annotations"]
    assert notes["prometheus.io/path"] in paths
    assert notes["prometheus.io/port"] == str(port)
    service = one("rayservice.yaml", "Service")["spec"]
    assert service["ports"][0]["targetPort"] == container["readinessProbe"]["httpGet"]["port"] == "http"
    assert service["selector"] == pod["metadata"]["labels"]
    for group, budget in [("ingress", "cbir-ingress"), ("query", "cbir-query")]:
        budgeted = one("rayservice.yaml", "PodDisruptionBudget", budget)["spec"]
        assert budgeted["selector"]["matchLabels"] == groups[group]["template"]["metadata"]["labels"]
        assert budgeted["minAvailable"] == groups[group]["replicas"] - 1


# Rights and secrets


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name != "accounts.yaml"])
def test_pods_have_few_rights_and_no_secrets_in_them(name: str) -> None:
    accounts = [doc["metadata"]["name"] for doc in documents("accounts.yaml") if doc["kind"] == "ServiceAccount"]
    found = [pod["spec"] for document in documents(name) for pod in pods(document)]
    assert found
    for spec in found:
        assert spec["serviceAccountName"] in accounts
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not [variable for variable in container.get("env", []) if "valueFrom" not in variable]


def test_the_nightly_account_may_create_rayjobs_and_nothing_else() -> None:
    assert one("accounts.yaml", "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    binding = one("accounts.yaml", "RoleBinding")
    [pod] = pods(one("nightly.yaml", "CronJob"))
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": pod["spec"]["serviceAccountName"]}]
    assert binding["roleRef"]["name"] == one("accounts.yaml", "Role")["metadata"]["name"]
    assert one("accounts.yaml", "ServiceAccount", "cbir")["automountServiceAccountToken"] is False


# Images


def test_manifests_name_images_and_versions_that_are_built() -> None:
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    built = {f"registry.example.com/cbir:{version}-{path.stem}" for path in CONTAINERFILES}
    texts = [path.read_text() for path in KUBERAY.glob("*.yaml")]
    assert set(re.findall(r"image: (\S+)", "".join(texts))) == built
    assert set(re.findall(r'rayVersion: "(.*)"', "".join(texts))) == {pins()["ray"]}
    assert {name for path in CONTAINERFILES for name in re.findall(r"-t (\S+)", path.read_text())} == built


def pins() -> dict[str, str]:
    """Package -> its pinned version."""
    lines = (PROJECT / "constraints.txt").read_text().split()
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def instructions(path: Path) -> list[tuple[str, str]]:
    parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
    return [(line["instruction"], line["value"]) for line in parser.structure if line["instruction"] != "COMMENT"]


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.stem)
def test_containers_copy_what_exists_and_run_the_command_without_root(path: Path) -> None:
    said = dict(instructions(path))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    copied = {source for name, value in instructions(path) if name == "COPY" for source in value.split()[:-1]}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "cbir", "pipelines"}
    assert all((PROJECT / source).exists() for source in copied)
    assert json.loads(said["ENTRYPOINT"]) == ["cbir"]
    assert "cbir" in project["scripts"]
    assert said["USER"] == "1000:1000"
    users = {pod["spec"]["securityContext"]["runAsUser"] for name in MANIFESTS for pod in pods(documents(name))}
    assert users == {1000}
    python = re.fullmatch(r"docker.io/library/python:([0-9.]+)-slim-\w+", said["FROM"])
    assert python is not None
    assert project["requires-python"] == f">={python.group(1)}"


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.stem)
def test_containers_install_pinned_packages_alone(path: Path) -> None:
    [made] = [value for name, value in instructions(path) if name == "RUN" and "python -c" in value]
    program = shlex.split(made)[2].replace("/src/", f"{PROJECT}/")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    needed = {normal(re.match(r"[\w.-]+", line).group()) for line in printed.getvalue().split()}  # type: ignore[union-attr]
    assert {"ray", "torch", "faiss-cpu"} <= needed <= pins().keys()
    assert "ray[default,serve]" in printed.getvalue(), "KubeRay needs the job server, RayService needs Serve"
    for name, value in instructions(path):
        assert name != "RUN" or "pip install" not in value or "-c /src/constraints.txt" in value or "--no-deps" in value


def test_the_image_for_processors_takes_torch_from_the_index_without_cuda() -> None:
    runs = [value for name, value in instructions(DEPLOY / "containers" / "cpu.Containerfile") if name == "RUN"]
    [torch] = [number for number, value in enumerate(runs) if "https://download.pytorch.org/whl/cpu" in value]
    [others] = [number for number, value in enumerate(runs) if "-r /src/requirements.txt" in value]
    assert torch < others
    [pattern] = re.findall(r"grep -E '(.*)' /src/constraints.txt", runs[torch])
    taken = [line for line in (PROJECT / "constraints.txt").read_text().split() if re.match(pattern, line)]
    assert [line.partition("==")[0] for line in taken] == ["torch", "torchvision"]


# Schedules


def test_cron_and_systemd_run_at_the_same_time_as_the_cluster() -> None:
    lines = (DEPLOY / "cron" / "cbir.cron").read_text().splitlines()
    [line] = [line for line in lines if line and not line.startswith("#") and "=" not in line.split()[0]]
    assert line.split()[:5] == one("nightly.yaml", "CronJob")["spec"]["schedule"].split()
    assert line.split()[5] == "cbir"
    timer, service = configparser.ConfigParser(), configparser.ConfigParser(interpolation=None)
    timer.read(DEPLOY / "cron" / "cbir-nightly.timer")
    service.read(DEPLOY / "cron" / "cbir-nightly.service")
    assert timer["Timer"]["OnCalendar"] == "*-*-* 02:00:00"
    assert service["Service"]["Type"] == "oneshot"


@pytest.fixture(scope="module")
def run_rayjob() -> ModuleType:
    """The program of the nightly pod, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("run_rayjob", KUBERAY / "run_rayjob.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_rayjob"] = module
    spec.loader.exec_module(module)
    return module


class FakeApi(http.server.ThreadingHTTPServer):
    """A Kubernetes API with RayJobs, whose answers to GET are given in a row: a status, or the code of an error."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.rayjobs, self.posts = answers, {}, 0
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeApi

    def reply(self, code: int, body: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self) -> None:
        rayjob = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posts += 1
        assert self.path == "/apis/ray.io/v1/namespaces/nights/rayjobs"
        known = rayjob["metadata"]["name"] in self.server.rayjobs
        self.server.rayjobs[rayjob["metadata"]["name"]] = rayjob
        self.reply(409 if known else 201, {})

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        answer = self.server.answers.pop(0)
        if self.path.rpartition("/")[2] not in self.server.rayjobs:
            answer = 404
        self.reply(answer, {}) if isinstance(answer, int) else self.reply(200, {"status": answer})

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def fake_api(module: ModuleType, folder: Path, answers: list[Any]) -> Iterator[tuple[FakeApi, Any]]:
    (folder / "namespace").write_text("nights")
    (folder / "token").write_text("secret")
    with FakeApi(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server, module.Api(f"http://127.0.0.1:{server.server_port}", folder)
        finally:
            server.shutdown()
            thread.join()


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([{}, RUNNING, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}], 0),
        ([RUNNING, 500, 401, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}], 0),
        ([{"jobDeploymentStatus": "Retrying"}, {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}], 3),
        ([{"jobDeploymentStatus": "ValidationFailed", "message": "no entrypoint"}], 3),
        ([{"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}], 3),
        ([RUNNING, 404], 3),
    ],
)
def test_the_nightly_pod_waits_for_the_end(
    run_rayjob: ModuleType, tmp_path: Path, answers: list[Any], code: int
) -> None:
    with fake_api(run_rayjob, tmp_path, answers) as (server, api):
        api.create(run_rayjob.named(one("rayjob.yaml", "RayJob"), "cbir reindex", "night-1", "uid-1"))
        assert run_rayjob.wait(api, "night-1", poll_s=0.01) == code
        assert not server.answers


def test_a_pod_that_replaces_another_waits_for_the_same_job(run_rayjob: ModuleType, tmp_path: Path) -> None:
    rayjob = run_rayjob.named(one("rayjob.yaml", "RayJob"), "cbir reindex", "night-1", "uid-1")
    check_schema(rayjob, KUBERNETES[-1])
    assert rayjob["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    with fake_api(run_rayjob, tmp_path, [RUNNING]) as (server, api):
        api.create(rayjob)
        api.create(rayjob)
        assert server.posts == 2
        assert list(server.rayjobs) == ["night-1"]
        assert server.rayjobs["night-1"]["spec"]["entrypoint"] == "cbir reindex"
