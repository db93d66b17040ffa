"""Dockerfiles and recipes are what Docker, Kubernetes, Kubeflow and KServe read, and say what `dlrm` does.

That their commands do what they are for is tested in tests/integration/test_recipes.py.
"""

import ast
import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest

import torchdlrm

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOYMENT, KSERVE = ROOT / "deploy" / "serve.yaml", ROOT / "deploy" / "kserve.yaml"
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
KUBERNETES = "1.37"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def objects(path):
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def every_object():
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.name}: {document['kind']}")


def problems_of(document):
    """What the schema of its kind says against an object; a key that the kind does not have is a problem."""
    group = document["apiVersion"].partition("/")[0]
    if group == "trainer.kubeflow.org":
        models = pytest.importorskip("kubeflow_trainer_api.models")
        read = getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document).to_dict()
        return "" if read == document else f"unknown keys: read as {read}"
    if group == "serving.kserve.io":
        version = document["apiVersion"].partition("/")[2].capitalize()
        return unknown_keys(document, f"{version}{document['kind']}", kserve_models())
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


def kserve_models():
    """Keys and types of each class of KServe's client, which is read and not imported: it needs much else."""
    found = importlib.util.find_spec("kserve")
    if found is None:
        pytest.skip("needs KServe's client, for its schemas alone: pip install --no-deps kserve")
    models = {}
    for path in Path(found.origin).with_name("models").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                fields = {a.targets[0].id: a.value for a in node.body if isinstance(a, ast.Assign)}
                if "openapi_types" in fields:
                    types, names = (ast.literal_eval(fields[name]) for name in ("openapi_types", "attribute_map"))
                    models[node.name] = {names[field]: kind for field, kind in types.items()}
    return models


def unknown_keys(value, kind, models):
    """Keys of an object that its class does not have, deeper down too; Kubernetes' own classes are not KServe's."""
    inner = re.sub(r"^list\[(.*)\]$", r"\1", kind)
    if inner != kind:
        return "; ".join(filter(None, (unknown_keys(item, inner, models) for item in value)))
    if kind not in models:
        return ""
    unknown = [f"{kind} has no {key}" for key in value if key not in models[kind]]
    deeper = (unknown_keys(item, models[kind][key], models) for key, item in value.items() if key in models[kind])
    return "; ".join([*unknown, *filter(None, deeper)])


@pytest.mark.parametrize("document", list(every_object()))
def test_every_object_is_what_the_schema_of_its_kind_asks_for(document):
    assert problems_of(document) == ""
    document["spec" if "spec" in document else "metadata"]["replicaz"] = 2
    assert "replicaz" in problems_of(document) or "unknown keys" in problems_of(document)


def containers_of(node):
    """Every container of an object, wherever it stands."""
    if isinstance(node, list):
        return [found for item in node for found in containers_of(item)]
    if not isinstance(node, dict):
        return []
    own = [item for key in ("containers", "initContainers") for item in node.get(key, ())]
    return own + [found for item in node.values() for found in containers_of(item)]


@pytest.mark.parametrize("document", list(every_object()))
def test_every_container_that_needs_the_bucket_has_its_keys_and_a_cache(document):
    for container in containers_of(document):
        if re.search('s3://|"dask", "worker"', json.dumps(container)):
            assert container["envFrom"] == [{"secretRef": {"name": "torchdlrm-bucket", "optional": True}}]
            assert "/cache" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_a_pod_of_kserve_is_one_that_kubernetes_takes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    both = objects(KSERVE)
    predictor = both["InferenceService"]["spec"]["predictor"]
    spec = {key: predictor[key] for key in ("terminationGracePeriodSeconds", "serviceAccountName")}
    spec["containers"] = both["ServingRuntime"]["spec"]["containers"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "clicks"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


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
def test_the_server_is_not_root(pod, container):
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {**pod.get("securityContext", {}), **container["securityContext"]}["runAsNonRoot"] is True


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_start_a_verb_that_is_there_as_somebody_who_is_not_root(dockerfile):
    text = dockerfile.read_text()
    last_stage = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER (?!0|root)", last_stage, re.MULTILINE)
    entrypoint, command = (
        json.loads(re.search(rf"^{key} (\[.*\])$", last_stage, re.MULTILINE)[1]) for key in ("ENTRYPOINT", "CMD")
    )
    assert entrypoint[0] == "dlrm"
    assert "install --directory --mode 1777 /cache" in last_stage  # for any user
    assert "TORCHDLRM_CACHE=/cache" in last_stage
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
    assert len(versions) == 8
    for path in MANIFESTS:
        images = re.findall(r"image: [\w-]+:(\S+)", path.read_text())
        assert set(images) <= {torchdlrm.__version__}
    assert set(versions.values()) == {torchdlrm.__version__}
    assert f"## {torchdlrm.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
