# SPDX-License-Identifier: Apache-2.0
"""The deployment examples: they parse, fit together, and give settings that the package accepts."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.fit import ModelShape, ServerShape, fit

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
WORKFLOWS = ROOT / ".github" / "workflows"
KUBERNETES = "1.30"
"""The oldest version of Kubernetes whose schemas check the manifests; the newest checks them, too."""
SOCKET_NAME = 107
"""Bytes that a Unix socket's path may have."""


def read(name: str) -> Any:
    documents = list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))
    return documents if len(documents) > 1 else documents[0]


def pod_templates(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    template = group["spec"]["leaderWorkerTemplate"]
    return {role: template[f"{role}Template"]["spec"] for role in ("leader", "worker")}


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def check_pod(spec: dict[str, Any]) -> None:
    """Assert that a pod is restricted, and that its caches and sockets lie in volumes."""
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    (container,) = spec["containers"]
    restricted = container["securityContext"]
    assert restricted["readOnlyRootFilesystem"] is True
    assert restricted["allowPrivilegeEscalation"] is False
    assert re.search(r":v?\d", container["image"])
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) <= volumes
    assert "/dev/shm" in mounts
    variables = environment(container)
    for name in ("TMPDIR", "HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "HF_HOME"):
        assert any(variables[name] == path or variables[name].startswith(path + "/") for path in mounts), name
    assert any(variables["VLLM_RPC_BASE_PATH"] == path for path in mounts)
    assert len(variables["VLLM_RPC_BASE_PATH"]) + len("/") + 36 <= SOCKET_NAME  # vLLM's sockets: named by a UUID
    assert "eplb" in variables["VLLM_PLUGINS"].split(",")


def check_probes(container: dict[str, Any]) -> None:
    """Assert that the probes ask the engine's health, which does not depend on the balancer."""
    ports = {port["name"] for port in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"]["path"] == "/health"
        assert container[kind]["httpGet"]["port"] in ports
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200  # large models load for long


def test_every_pod_is_restricted_and_writes_to_volumes() -> None:
    group, _ = read("kubernetes.yaml")
    for spec in pod_templates(group).values():
        check_pod(spec)


def without_context(spec: dict[str, Any]) -> None:
    del spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"]


def with_cache_elsewhere(spec: dict[str, Any]) -> None:
    next(v for v in spec["containers"][0]["env"] if v["name"] == "HOME")["value"] = "/home/user"


def with_long_folder(spec: dict[str, Any]) -> None:
    next(v for v in spec["containers"][0]["env"] if v["name"] == "VLLM_RPC_BASE_PATH")["value"] = "/tmp/" + "t" * 90


@pytest.mark.parametrize("spoil", [without_context, with_cache_elsewhere, with_long_folder])
def test_check_of_pods_can_fail(spoil: Callable[[dict[str, Any]], None]) -> None:
    group, _ = read("kubernetes.yaml")
    spec = copy.deepcopy(pod_templates(group)["leader"])  # anchors share their values
    spoil(spec)
    with pytest.raises((AssertionError, KeyError)):
        check_pod(spec)


def test_probes_ask_for_the_health_of_the_engine() -> None:
    group, service = read("kubernetes.yaml")
    pods = pod_templates(group)
    check_probes(pods["leader"]["containers"][0])
    assert not [key for key in pods["worker"]["containers"][0] if key.endswith("Probe")]
    labels = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] == "http"


def test_leader_and_worker_make_one_group_of_ranks() -> None:
    group, _ = read("kubernetes.yaml")
    assert (group["apiVersion"], group["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    commands = {role: spec["containers"][0]["args"][0] for role, spec in pod_templates(group).items()}
    sizes = {re.search(r"--data-parallel-size (\d+)", command)[1] for command in commands.values()}  # type: ignore[index]
    local = {re.search(r"--data-parallel-size-local (\d+)", command)[1] for command in commands.values()}  # type: ignore[index]
    (ranks,), (per_node,) = sizes, local
    assert int(ranks) == int(per_node) * template["size"]
    gpus = {spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for spec in pod_templates(group).values()}
    assert gpus == {per_node}
    assert f"LWS_WORKER_INDEX * {per_node}" in commands["worker"]
    assert "--headless" in commands["worker"]
    assert "--headless" not in commands["leader"]
    options = [
        set(re.findall(r"--(data-parallel-(?:address|rpc-port) \S+|additional-config \S+)", c))
        for c in commands.values()
    ]
    assert options[0] == options[1]
    settings = environment(pod_templates(group)["leader"]["containers"][0])["EPLB"]
    config = EplbConfig.from_additional_config(json.loads(settings))
    fit(config, ModelShape(num_experts=256), ServerShape(ep_size=int(ranks), expert_parallel=True))


def test_compose_wires_server_prometheus_and_grafana() -> None:
    services = read("compose.yaml")["services"]
    for service in services.values():
        assert re.search(r":v?\d|^vllm-eplb$", service["image"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
    server = services["vllm"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    image = (DEPLOY / "Dockerfile.vllm").read_text(encoding="utf-8")
    made = re.search(r"^RUN install -d -o 2000 -g 2000 (.*)$", image, re.M)[1].split()  # type: ignore[index]
    assert {volume.split(":")[1] for volume in server["volumes"]} <= set(made)  # the user owns new volumes
    assert (DEPLOY / services["vllm"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["vllm"]["build"]["dockerfile"]).exists()
    assert services["vllm"]["healthcheck"]["test"][-1].endswith("/health")
    scraped = read("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == ["vllm:8000"]
    assert services["vllm"]["ports"] == ["8000:8000"]
    (source,) = read("grafana/datasource.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["9090:9090"]
    (provider,) = read("grafana/dashboards.yml")["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounted
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted


def test_compose_gives_settings_that_are_accepted() -> None:
    (line,) = (part for part in read("compose.yaml")["services"]["vllm"]["command"] if "additional-config" in part)
    text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", line.partition("=")[2])
    config = EplbConfig.from_additional_config(json.loads(text))
    assert config.dynamic
    assert (config.num_redundant_experts or 0) == 0


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    shutil.copy(DEPLOY / "prometheus.yml", tmp_path)
    shutil.copy(ROOT / "examples" / "grafana" / "alerts.yml", tmp_path)
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["Dockerfile.vllm", "Dockerfile.ascend"])
def test_images_are_built_on_a_named_tag_and_run_as_a_user(name: str) -> None:
    lines = [line for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    image = lines[0].removeprefix("ARG IMAGE=")
    assert re.fullmatch(r"(vllm/vllm-openai|quay\.io/ascend/vllm-ascend):v[\w.]+", image)
    users = [line for line in lines if line.startswith("USER ")]
    assert users[-1] != "USER root"
    known = {"ARG", "FROM", "USER", "RUN", "COPY", "ENV"}
    assert {line.split()[0] for line in lines if not line.startswith(" ")} <= known
    assert "COPY . /src" in lines


# --- by schema --------------------------------------------------------------------------------------------------------


def follows_schema(name: str, path: Path) -> bool:
    """True if a file follows a schema that check-jsonschema contains; needs no network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("schema", "path", "spoil"),
    [
        ("compose-spec", DEPLOY / "compose.yaml", ("read_only:", "readonly:")),
        ("github-workflows", WORKFLOWS / "release.yml", ("runs-on:", "run-on:")),
        ("github-workflows", WORKFLOWS / "npu.yml", ("timeout-minutes:", "timeout-minute:")),
    ],
)
def test_files_follow_their_schema(tmp_path: Path, schema: str, path: Path, spoil: tuple[str, str]) -> None:
    pytest.importorskip("check_jsonschema")
    assert follows_schema(schema, path)
    text = path.read_text(encoding="utf-8")
    assert spoil[0] in text
    (tmp_path / path.name).write_text(text.replace(*spoil))
    assert not follows_schema(schema, tmp_path / path.name)


LEADER_WORKER_SET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["leaderWorkerTemplate"],
            "properties": {
                "replicas": {"type": "integer", "minimum": 0},
                "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
                "rolloutStrategy": {"type": "object"},
                "networkConfig": {"type": "object"},
                "leaderWorkerTemplate": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["workerTemplate"],
                    "properties": {
                        "leaderTemplate": {"type": "object"},
                        "workerTemplate": {"type": "object"},
                        "size": {"type": "integer", "minimum": 1},
                        "restartPolicy": {
                            "enum": ["Default", "None", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart"]
                        },
                        "subGroupPolicy": {"type": "object"},
                    },
                },
            },
        },
    },
}
"""Written after the API's reference, because no package has this resource's schema. Kubernetes' own schemas check the
pod templates."""


def follows_kubernetes(manifests: list[dict[str, Any]]) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    kubernetes = pytest.importorskip("kubernetes_validate")
    group, *core = copy.deepcopy(manifests)
    try:
        jsonschema.validate(group, LEADER_WORKER_SET)
        template = group["spec"]["leaderWorkerTemplate"]
        for pod in (template["leaderTemplate"], template["workerTemplate"]):
            selector = {"matchLabels": pod["metadata"]["labels"]}
            deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "pod"}}
            core.append({**deployment, "spec": {"selector": selector, "template": pod}})
        for version in (KUBERNETES, kubernetes.latest_version()):
            for manifest in core:
                kubernetes.validate(manifest, version, strict=True)
    except (jsonschema.ValidationError, kubernetes.ValidationError):
        return False
    return True


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("readinessProbe:", "readyProbe:"),
        ("restartPolicy: Recreate", "restartPolicy: Restart"),
        ("containerPort: 8000", "containerPort: http"),
        ("targetPort:", "target:"),
        ("size: 2", "sizes: 2"),
    ],
)
def test_manifests_follow_the_schemas_of_kubernetes(right: str, wrong: str) -> None:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    assert follows_kubernetes(list(yaml.safe_load_all(text)))
    assert right in text
    assert not follows_kubernetes(list(yaml.safe_load_all(text.replace(right, wrong))))


def test_workflows_parse_and_name_scripts_that_exist() -> None:
    paths, scripts = list(WORKFLOWS.glob("*.yml")), 0
    assert paths
    for path in paths:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["jobs"]
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), step
                for script in re.findall(r"\bscripts/[\w.]+", step.get("run", "")):
                    assert (ROOT / script).exists(), script
                    scripts += 1
    assert scripts
