"""What stands in deploy/: manifests fit the schemas of Kubernetes and each other, and ask only for what is there."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelwright.base.errors import ConfigError
from modelwright.base.types import Usage
from modelwright.engine.engine import EngineStats
from modelwright.serve.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VERSION = "1.31"


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_every_manifest_fits_the_schema_of_kubernetes(file: Path):
    validate = pytest.importorskip("kubernetes_validate")
    documents = [document for document in yaml.safe_load_all(file.read_text()) if document is not None]
    assert documents, f"{file.name} has no manifest"
    for document in documents:
        validate.validate(document, VERSION, strict=True)  # raises


def test_the_check_finds_a_wrong_field():
    validate = pytest.importorskip("kubernetes_validate")
    wrong = manifest("service")
    wrong["spec"]["ports"][0]["port"] = "eighty"
    with pytest.raises(Exception, match="eighty"):
        validate.validate(wrong, VERSION, strict=True)


def test_everything_points_at_the_deployment_and_nothing_runs_as_root():
    deployment = manifest("deployment")
    pod = deployment["spec"]["template"]
    labels, container = pod["metadata"]["labels"], pod["spec"]["containers"][0]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == manifest("service")["spec"]["selector"]
    assert manifest("disruption")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("network")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("autoscaler")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == manifest("secret")["metadata"]["name"]
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == manifest("volume")["metadata"]["name"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def test_the_key_file_of_the_secret_can_be_read(tmp_path: Path):
    from modelwright.serve.keys import KeyRing

    (tmp_path / "keys.yaml").write_text(manifest("secret")["stringData"]["keys.yaml"])
    assert len(KeyRing.load(tmp_path / "keys.yaml").meters) == 1


def test_the_options_of_the_containers_are_those_of_the_verb():
    import typer

    from modelwright.cli.serve import serve

    app = typer.Typer(add_completion=False)
    app.command()(serve)
    known = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    asked = manifest("deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    asked = [*asked, *ast.literal_eval(lines[-1].removeprefix("CMD "))]
    assert {word.split("=")[0] for word in asked if word.startswith("--")} <= known


def ray_service() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text()))


def test_the_ray_service_fits_the_schemas_of_kuberay_and_of_kubernetes():
    jsonschema = pytest.importorskip("jsonschema")
    validate = pytest.importorskip("kubernetes_validate")
    schema = json.loads((Path(__file__).parent / "rayservice_schema.json").read_text())
    document = ray_service()
    jsonschema.validate(document, schema)
    cluster = document["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        validate.validate(pod, VERSION, strict=True)
        spec, deployed = group["template"]["spec"], manifest("deployment")["spec"]["template"]["spec"]
        assert spec["securityContext"] == deployed["securityContext"]
        assert {v["name"] for v in spec["volumes"]} == {v["name"] for v in deployed["volumes"]}
    wrong = ray_service()
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(wrong, schema)


def test_the_ray_service_asks_for_an_application_that_is_there_with_arguments_it_knows():
    from modelwright.cli import fleet

    (asked,) = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])["applications"]
    module, _, name = asked["import_path"].partition(":")
    assert module == fleet.__name__ and callable(getattr(fleet, name))
    assert set(asked["args"]) <= set(fleet.KNOWN)
    volumes = ray_service()["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounted = [mount["mountPath"] for mount in volumes["volumeMounts"]]
    assert all(any(asked["args"][n].startswith(path) for path in mounted) for n in ("model", "api_key_file"))
    with pytest.raises(ConfigError, match="fleet: modle is unknown; known: model"):
        fleet.build({"modle": "x"})


@pytest.mark.peer
def test_ray_serve_reads_the_config_of_the_ray_service():
    schema = pytest.importorskip("ray.serve.schema", exc_type=ImportError)
    read = schema.ServeDeploySchema.model_validate(yaml.safe_load(ray_service()["spec"]["serveConfigV2"]))
    assert read.applications[0].route_prefix == "/"


def metrics_there() -> set[str]:
    """The names in /metrics of a server that has answered."""
    stats = EngineStats(*[0] * 11)
    metrics = Metrics(lambda: stats)
    metrics.requests.labels("/", "200").inc()
    metrics.running.labels("m").inc()
    for histogram in (metrics.first, metrics.gaps, metrics.whole):
        histogram.labels("m").observe(1)
    metrics.count_usage(Usage(1, 1))
    return {re.split(r"[{ ]", line)[0] for line in metrics.render().decode().splitlines() if line[0] != "#"}


def test_dashboard_and_rules_name_metrics_that_exist():
    board = json.loads((DEPLOY / "grafana" / "modelwright.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    rules = [
        rule
        for g in yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
        for rule in g["rules"]
    ]
    made = {rule["record"] for rule in rules if "record" in rule}
    names = set(re.findall(r"modelwright[\w:]*", " ".join([*asked, *(rule["expr"] for rule in rules)])))
    assert names - made <= metrics_there(), names - made - metrics_there()
    assert len(names) > 8


def test_the_image_runs_as_nobody_in_particular_and_asks_a_route_that_exists():
    text = (DEPLOY / "Dockerfile").read_text()
    assert "USER 10001" in text and "HEALTHCHECK" in text and "/health/ready" in text
