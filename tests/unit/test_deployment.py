"""Dockerfiles and Kubernetes objects say what `dlrm serve` does: its options, port, probes, and time to stop."""

import json
import re
import runpy
from pathlib import Path

import pytest

import torchdlrm

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOYMENT, KSERVE = ROOT / "deploy" / "kubernetes.yaml", ROOT / "deploy" / "kserve.yaml"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def objects(path):
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def pods():
    """Of each file with a pod: the pod's spec and its one container."""
    alone = objects(DEPLOYMENT)["Deployment"]["spec"]["template"]["spec"]
    both = objects(KSERVE)
    parts = both["ServingRuntime"]["spec"] | both["InferenceService"]["spec"]["predictor"]
    return [
        pytest.param(pod, pod["containers"][0], id=name) for name, pod in [("kubernetes", alone), ("kserve", parts)]
    ]


def parsed(arguments):
    """The options that `dlrm serve` understands from these arguments."""
    from cyclopts import App

    from torchdlrm.cli.main import app

    _, bound, _ = App.parse_args(app, ["serve", *arguments], print_error=False, exit_on_error=False)
    bound.apply_defaults()
    return bound.arguments["options"]


@pytest.mark.parametrize(("pod", "container"), pods())
def test_the_server_takes_the_arguments_and_listens_where_it_is_asked(pod, container):
    options = parsed(container["args"])
    assert options.host == "0.0.0.0"
    assert {port["containerPort"] for port in container["ports"]} == {options.port}
    names = {port.get("name"): port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        port = container[probe]["httpGet"]["port"]
        assert names.get(port, port) == options.port
    assert pod["terminationGracePeriodSeconds"] > options.drain_s + options.shutdown_timeout_s


@pytest.mark.parametrize(("pod", "container"), pods())
def test_probes_and_metrics_are_routes_of_the_server(pod, container):
    from torchdlrm.serving.front import app

    routes = Path(app.__file__).parent.rglob("*.py")
    source = "\n".join(path.read_text() for path in routes)
    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    annotations = [
        objects(DEPLOYMENT)["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"],
        objects(KSERVE)["ServingRuntime"]["metadata"]["annotations"]["prometheus.kserve.io/path"],
    ]
    assert [path for path in [*paths, *annotations] if f'"{path}"' not in source] == []


def test_the_service_and_the_deployment_find_each_other():
    found = objects(DEPLOYMENT)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert found[kind]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    both = objects(KSERVE)
    model = both["InferenceService"]["spec"]["predictor"]["model"]
    assert model["runtime"] == both["ServingRuntime"]["metadata"]["name"]
    assert model["modelFormat"]["name"] in {
        it["name"] for it in both["ServingRuntime"]["spec"]["supportedModelFormats"]
    }


@pytest.mark.parametrize(("pod", "container"), pods())
def test_the_bundle_cannot_be_written_and_the_server_is_not_root(pod, container):
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {**pod.get("securityContext", {}), **container["securityContext"]}["runAsNonRoot"] is True
    assert all(mount.get("readOnly") for mount in container.get("volumeMounts", []) if mount["name"] == "bundle")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_start_a_verb_that_is_there_as_somebody_who_is_not_root(dockerfile):
    text = dockerfile.read_text()
    last_stage = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER (?!0|root)", last_stage, re.MULTILINE)
    entrypoint, command = (
        json.loads(re.search(rf"^{key} (\[.*\])$", last_stage, re.MULTILINE)[1]) for key in ("ENTRYPOINT", "CMD")
    )
    assert entrypoint[0] == "dlrm"
    if entrypoint[1:] == ["serve"]:
        options = parsed(command)
        assert f"EXPOSE {options.port}\n" in last_stage
        assert f"127.0.0.1:{options.port}/v2/health/live" in last_stage
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_the_images_copy_is_not_ignored(dockerfile):
    kept = {
        line.removeprefix("!").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line[:1] == "!"
    }
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile.read_text(), re.MULTILINE)
    assert {name.rstrip("/") for names in copied for name in names.split()} <= kept


def test_every_file_that_holds_the_version_holds_the_same():
    release = runpy.run_path(str(ROOT / ".ci" / "release.py"))
    versions = release["versions"]()
    assert len(versions) == 5
    assert set(versions.values()) == {torchdlrm.__version__}
    assert f"## {torchdlrm.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
