"""The files for clusters say what their readers understand: Ray, AWS, KubeRay, Kubernetes, Compose, Docker and Grafana.

None of those is at hand here, and most of them ignore, or refuse hours later, what they do not know. Ray and botocore check
what they can themselves; for the others the fields in use are written down below, from their published references.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator
from ray.autoscaler._private import autoscaler, updater
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider as aws_provider
from ray.autoscaler._private.util import prepare_config, validate_config

from fisher_ray import __version__, cli, cluster
from fisher_ray.plan import RunConfig

ROOT = Path(__file__).parent.parent
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
RAYJOB = yaml.safe_load((ROOT / "docker/rayjob.yaml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
DASHBOARD = json.loads((ROOT / "docker/grafana.json").read_text())
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(line.split("==") for line in CONSTRAINTS.splitlines() if "==" in line)

# What the package exports, as Ray names it at its metrics port.
GAUGES = {f"ray_fisher_ray_{name}" for name in cluster.GAUGES}
COUNTERS = {f"ray_fisher_ray_{name}_total" for name in cluster.COUNTERS}
HISTOGRAMS = {f"ray_fisher_ray_task_seconds_{part}" for part in ("bucket", "count", "sum")}
RAYS_OWN = {"ray_node_gpus_utilization"}


def started(command: str) -> dict[str, str]:
    """The flags of a ``ray start`` command."""
    words = shlex.split(command)
    assert words[:2] == ["ray", "start"]
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in words[2:])}


def mistakes(schema: dict[str, Any], value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(value)]


def closed(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def mapped(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


STRING: dict[str, Any] = {"type": "string"}
BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGT]i?|m)?$"}
SECONDS = {"type": "string", "pattern": "^[0-9]+[smh]$"}


# ---- all of them -------------------------------------------------------------------------------------------------------


def images() -> list[str]:
    groups = [RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"], *RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    pods = [container["image"] for group in groups for container in group["template"]["spec"]["containers"]]
    built = re.findall(r"-t (\S+)", DOCKERFILE)
    return [
        CLUSTER["docker"]["image"],
        *pods,
        *built,
        *(service["image"] for service in COMPOSE["services"].values()),
    ]


def test_one_image_of_this_version() -> None:
    assert len(images()) == 7
    for image in images():
        assert re.fullmatch(rf"(ghcr\.io/OWNER/)?fisher-ray:{re.escape(__version__)}-(gpu|cpu)", image), image


def test_gpus_where_there_are_gpus() -> None:
    built = re.findall(r"docker build .* -t (\S+)((?: \\\n#\s+--build-arg \S+)*)", DOCKERFILE)
    assert {image.rpartition("-")[2]: "whl/cpu" in arguments for image, arguments in built} == {
        "gpu": False,
        "cpu": True,
    }
    variants = [image.rpartition("-")[2] for image in images()]
    assert variants == ["gpu"] * 3 + [image.rpartition("-")[2] for image, _ in built] + ["cpu"] * 2
    for service in COMPOSE["services"].values():
        assert service["build"]["args"]["TORCH_INDEX"].endswith("whl/cpu")


def test_no_node_starts_open() -> None:
    assert re.search(r"^ENV (.*\\\n)* *RAY_AUTH_MODE=token\b", DOCKERFILE, re.M)
    assert "--env=RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert RAYJOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "fisher-ray"}
    for service in COMPOSE["services"].values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        # An empty token would be as good as a known one.
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_tokens_reach_the_place_where_ray_looks() -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    below_home = _get_default_token_path().relative_to(Path.home())
    home = re.search(r"\bHOME=(\S+)", DOCKERFILE)
    assert home is not None
    assert CLUSTER["file_mounts"] == {f"{home[1]}/{below_home}": f"~/{below_home}"}


def test_models_are_kept_where_the_image_looks_for_them() -> None:
    cache = re.search(r"\bHF_HOME=(\S+)", DOCKERFILE)
    assert cache is not None
    assert f"VOLUME {cache[1]}\n" in DOCKERFILE
    assert f"--env=HF_HOME={cache[1]}" in CLUSTER["docker"]["run_options"]
    assert any(option.endswith(f":{cache[1]}") for option in CLUSTER["docker"]["run_options"])
    for pod in pods():
        (container,) = pod["containers"]
        assert {"name": "HF_HOME", "value": cache[1]} in container["env"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == [cache[1]]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for service in COMPOSE["services"].values():
        assert f"models:{cache[1]}" in service["volumes"]


# ---- cluster.yaml ------------------------------------------------------------------------------------------------------


def cluster_types() -> dict[str, Any]:
    return CLUSTER["available_node_types"]


def test_ray_accepts_the_cluster() -> None:
    prepared = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(prepared)
    # Ray fills in what is missing: commands that would install another Ray over the image's.
    for stage in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert not any("pip install" in command for command in prepared[stage]), stage


def test_ray_reads_every_key_of_the_provider() -> None:
    readers = (aws_config, aws_provider, autoscaler, updater)
    source = "\n".join(inspect.getsource(module) for module in readers)
    read = set(re.findall(r"""provider(?:_config)?(?:["']\])?(?:\.get\(|\[)\s*["'](\w+)["']""", source))
    assert {"region", "cache_stopped_nodes", "availability_zone", "type"} <= read  # the pattern still finds them
    assert CLUSTER["provider"].keys() <= read


@pytest.mark.parametrize("name", CLUSTER["available_node_types"])
def test_ec2_accepts_every_node(name: str) -> None:
    ec2 = botocore.session.get_session().get_service_model("ec2")
    request = {**cluster_types()[name]["node_config"], "MinCount": 1, "MaxCount": 1}  # Ray adds the counts
    report = ParamValidator().validate(request, ec2.operation_model("RunInstances").input_shape)
    assert not report.has_errors(), report.generate_report()
    types = ec2.shape_for("InstanceType").enum
    assert request["InstanceType"] in types


def test_the_head_has_no_work() -> None:
    head = cluster_types()[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    flags = started(CLUSTER["head_start_ray_commands"][-1])
    assert (flags["num-cpus"], flags["num-gpus"]) == ("0", "0")
    assert "InstanceMarketOptions" not in head["node_config"]  # with it goes the driver


def test_spot_first_and_the_same_on_demand() -> None:
    workers = {name: node for name, node in cluster_types().items() if name != CLUSTER["head_node_type"]}
    spot, on_demand = workers["gpu-spot"], workers["gpu-on-demand"]
    assert len(workers) == 2
    assert spot["node_config"] == {**on_demand["node_config"], "InstanceMarketOptions": {"MarketType": "spot"}}
    # At equal resources priority decides, as long as neither has just failed to start.
    assert spot["resources"] == on_demand["resources"]
    assert spot["resources"]["GPU"] == 1
    assert spot["priority"] > on_demand["priority"]
    for node in (spot, on_demand):
        assert node["min_workers"] == 0 < node["max_workers"] <= CLUSTER["max_workers"]


def test_every_node_of_the_cluster_has_a_role() -> None:
    # Ray gives one to the head alone; without it workers could not write to the bucket.
    assert all("Name" in node["node_config"]["IamInstanceProfile"] for node in cluster_types().values())


def test_ray_start_knows_its_flags() -> None:
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    commands = [CLUSTER["head_start_ray_commands"][-1], CLUSTER["worker_start_ray_commands"][-1]]
    commands += [service["command"] for service in COMPOSE["services"].values()]
    for command in commands:
        assert started(command).keys() <= known
        assert started(command)["metrics-export-port"] == "8080"
    groups = [RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"], *RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:
        assert group["rayStartParams"].keys() <= known
        assert group["rayStartParams"]["metrics-export-port"] == "8080"


# ---- rayjob.yaml -------------------------------------------------------------------------------------------------------

# Of Kubernetes' core/v1, what is in use.
POD = closed(
    "containers",
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
    securityContext=closed(runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
    tolerations=listed(
        closed(
            key=STRING,
            operator={"enum": ["Exists", "Equal"]},
            value=STRING,
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
    containers=listed(
        closed(
            "name image resources",
            name=NAME,
            image=STRING,
            env=listed(
                {
                    "oneOf": [
                        closed("name value", name=STRING, value=STRING),
                        closed(
                            "name valueFrom",
                            name=STRING,
                            valueFrom=closed(
                                "secretKeyRef",
                                secretKeyRef=closed("name key", name=NAME, key=STRING, optional=BOOLEAN),
                            ),
                        ),
                    ]
                }
            ),
            ports=listed(
                closed(
                    "containerPort",
                    name={**NAME, "maxLength": 15},
                    containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
                )
            ),
            resources=closed(requests=mapped(QUANTITY), limits=mapped(QUANTITY)),
            volumeMounts=listed(closed("name mountPath", name=NAME, mountPath=STRING, readOnly=BOOLEAN)),
        )
    ),
    volumes=listed(
        {
            "oneOf": [
                closed(
                    "name persistentVolumeClaim",
                    name=NAME,
                    persistentVolumeClaim=closed("claimName", claimName=NAME, readOnly=BOOLEAN),
                ),
                closed("name emptyDir", name=NAME, emptyDir=closed(medium=STRING, sizeLimit=QUANTITY)),
            ]
        }
    ),
)
TEMPLATE = closed("spec", metadata=closed(labels=mapped(STRING), annotations=mapped(STRING)), spec=POD)
START = mapped(STRING)  # an unquoted number would be refused

# https://ray-project.github.io/kuberay/reference/api/
RAY_CLUSTER = closed(
    "headGroupSpec",
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=closed(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        image=STRING,
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    ),
    authOptions=closed(mode={"enum": ["disabled", "token"]}, secretName=NAME),
    headServiceAnnotations=mapped(STRING),
    headGroupSpec=closed(
        "template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        enableIngress=BOOLEAN,
        rayStartParams=START,
        template=TEMPLATE,
    ),
    workerGroupSpecs=listed(
        closed(
            "groupName template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts={"type": "integer", "minimum": 1},
            idleTimeoutSeconds=COUNT,
            rayStartParams=START,
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", name={**NAME, "maxLength": 47}, namespace=NAME, labels=mapped(STRING)),
    spec=closed(
        "entrypoint rayClusterSpec",
        entrypoint=STRING,
        entrypointNumCpus={"type": "number", "minimum": 0},
        entrypointNumGpus={"type": "number", "minimum": 0},
        entrypointResources=STRING,
        runtimeEnvYAML=STRING,
        jobId=STRING,
        metadata=mapped(STRING),
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=closed(backoffLimit=COUNT),
        submitterPodTemplate=TEMPLATE,
        backoffLimit=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=COUNT,
        suspend=BOOLEAN,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


def pods() -> list[dict[str, Any]]:
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_kuberay_knows_every_field() -> None:
    assert mistakes(RAY_JOB, RAYJOB) == []


def test_the_job_goes_on_and_cleans_up() -> None:
    job = RAYJOB["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0
    assert job["activeDeadlineSeconds"] > 3600
    assert job["entrypointNumCpus"] == 0  # the driver stays on the head
    assert job["rayClusterSpec"]["rayVersion"] == PINS["ray"]


def test_a_stopped_job_has_the_time_to_end() -> None:
    wait = yaml.safe_load(RAYJOB["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(wait) >= 30
    assert all(pod["terminationGracePeriodSeconds"] > int(wait) for pod in pods())


def test_kubernetes_workers_have_gpus_and_the_head_no_work() -> None:
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    start = cluster["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
    head, worker = (pod["containers"][0]["resources"] for pod in pods())
    assert "nvidia.com/gpu" not in head["limits"]
    assert worker["limits"]["nvidia.com/gpu"] == worker["requests"]["nvidia.com/gpu"] == "1"
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]


def test_the_entrypoint_is_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):  # noqa: N818
        """The run that would have been."""

    def asked(config: RunConfig, *_: Any) -> None:
        raise Asked(config)

    monkeypatch.setattr(cli, "run", asked)
    # KubeRay puts it as it is into the submitter's script, behind `ray job submit --`: its own shell sees three words.
    shell, option, script = shlex.split(RAYJOB["spec"]["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    command, otherwise = script.split(" || ")
    assert otherwise == "[ $? -eq 4 ]"  # what was set aside is no failure that another cluster mends
    program, *arguments = shlex.split(command)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts
    with pytest.raises(Asked) as said:
        cli.main(arguments)
    (config,) = said.value.args
    assert config.output.startswith("s3://")
    # Nothing has a GPU before the first worker is up: how many an actor needs must be said.
    assert config.gpus_per_actor == 1
    assert config.max_actors == RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]


# ---- compose.yaml ------------------------------------------------------------------------------------------------------

# https://github.com/compose-spec/compose-spec, what is in use.
SERVICE = closed(
    "image command",
    image=STRING,
    build=closed("context dockerfile", context=STRING, dockerfile=STRING, args=mapped(STRING)),
    command=STRING,
    init=BOOLEAN,
    shm_size={"type": "string", "pattern": "^[0-9]+(mb|gb)$"},
    environment=mapped(STRING),
    volumes=listed({"type": "string", "pattern": "^[^:]+:/[^:]+(:ro)?$"}),
    ports=listed({"type": "string", "pattern": r"^127\.0\.0\.1:[0-9]+:[0-9]+$"}),
    stop_grace_period=SECONDS,
    healthcheck=closed(
        "test",
        test=listed(STRING),
        interval=SECONDS,
        timeout=SECONDS,
        retries=COUNT,
        start_period=SECONDS,
    ),
    depends_on=mapped(
        closed(
            "condition",
            condition={"enum": ["service_started", "service_healthy", "service_completed_successfully"]},
        )
    ),
)
COMPOSE_FILE = {
    **closed("name services", name=NAME, services=mapped(SERVICE), volumes=mapped({"type": "null"})),
    "patternProperties": {"^x-": {}},
}


def test_compose_knows_every_key() -> None:
    assert mistakes(COMPOSE_FILE, COMPOSE) == []


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the objects within that have fields of their own; the maps are those with names of the user's choice."""
    maps = {"rayStartParams", "requests", "limits"}
    if isinstance(value, dict):
        if not path or path[-1] not in maps:
            yield path
        for key, inner in value.items():
            yield from objects(inner, (*path, key))
    elif isinstance(value, list):
        for key, inner in enumerate(value):
            yield from objects(inner, (*path, key))


@pytest.mark.parametrize(("schema", "file"), [(RAY_JOB, RAYJOB), (COMPOSE_FILE, COMPOSE)], ids=["rayjob", "compose"])
def test_an_unknown_field_is_found_at_every_level(schema: dict[str, Any], file: Any) -> None:
    free = {"environment", "args"}
    for path in objects(file):
        if path and (path[-1] in free or str(path[0]).startswith("x-") or path in (("services",), ("volumes",))):
            continue
        typo = json.loads(json.dumps(file))
        inner = typo
        for key in path:
            inner = inner[key]
        inner["replica"] = 1
        assert mistakes(schema, typo), path


def test_a_head_without_work_and_a_worker_that_waits_for_it() -> None:
    head, worker = COMPOSE["services"]["head"], COMPOSE["services"]["worker"]
    flags = started(head["command"])
    assert (flags["num-cpus"], flags["num-gpus"]) == ("0", "0")
    assert {"head", "block"} <= flags.keys()
    assert started(worker["command"])["address"].startswith("head:")
    assert "block" in started(worker["command"])
    assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert head["healthcheck"]["test"][0] == "CMD"


def test_what_compose_mounts_is_there() -> None:
    for service in COMPOSE["services"].values():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for source, *_ in (volume.split(":") for volume in service["volumes"]):
            assert (ROOT / "docker" / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"]


# ---- Dockerfile --------------------------------------------------------------------------------------------------------


def test_the_image_has_the_pinned_versions() -> None:
    python = re.search(r"Python (3\.\d+)", CONSTRAINTS)
    base = re.search(r"^ARG BASE=python:(3\.\d+)-", DOCKERFILE, re.M)
    assert python is not None
    assert base is not None
    assert base[1] == python[1]
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert len(installs) == 2
    for install in installs:
        assert "--constraint build/constraints.txt" in install
        assert "==" not in install  # versions are in constraints.txt and nowhere else
        assert "--editable" not in install
    assert {"ray", "torch"} <= PINS.keys()
    # boto3 and s3fs each want a botocore of few versions: unpinned, pip tries pair after pair.
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\./build\[([\w,]+)\]", DOCKERFILE)[0].split(","):
        assert {re.split(r"[^\w-]", requirement)[0] for requirement in optional.get(extra, [])} <= PINS.keys()


def test_the_image_can_be_built_from_what_docker_is_shown() -> None:
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for word in line.split()}
    assert copied == shown
    assert all((ROOT / path).exists() for path in copied)


def test_the_image_is_what_its_users_need() -> None:
    # `ray up` runs rsync in the container and ssh from the head; KubeRay's probes call wget; only an ARG before FROM can
    # name the base.
    system = re.search(r"apt-get install .*?([\w -]+?) \\", DOCKERFILE)
    assert system is not None
    assert {"openssh-client", "rsync", "wget"} <= set(system[1].split())
    assert DOCKERFILE.index("ARG BASE=") < DOCKERFILE.index("FROM ${BASE}")
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.M)
    assert users == ["ray"]
    uid = re.search(r"useradd .*--uid (\d+) .*ray", DOCKERFILE)
    assert uid is not None
    assert {pod["securityContext"]["runAsUser"] for pod in pods()} == {int(uid[1])}
    # `ray up` appends its own command, which an entry point would swallow.
    assert "ENTRYPOINT" not in DOCKERFILE


# ---- grafana.json ------------------------------------------------------------------------------------------------------


def targets() -> list[dict[str, Any]]:
    return [target for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_metric_shown_is_one_that_is_exported() -> None:
    queries = [target["expr"] for target in targets()]
    queries += [
        variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
    ]
    shown = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    known = GAUGES | COUNTERS | HISTOGRAMS | RAYS_OWN
    assert shown <= known, shown - known
    assert shown >= GAUGES | COUNTERS, (GAUGES | COUNTERS) - shown
    # A counter is of use by its rate alone, and starts anew with every actor.
    for name in COUNTERS | {"ray_fisher_ray_task_seconds_bucket"}:
        for query in queries:
            assert all(query[: found.start()].endswith(("rate(", "increase(")) for found in re.finditer(name, query)), (
                query
            )


def test_every_query_is_of_the_chosen_run_and_source() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "run"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    for target in targets():
        assert target["datasource"] == source
        ours = re.findall(r"\bray_fisher_ray_\w+(\{[^}]*\})?", target["expr"])
        assert all('run=~"$run"' in labels for labels in ours), target["expr"]
        assert target["expr"].count("(") == target["expr"].count(")"), target["expr"]
        assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= {"run", "__range", "__rate_interval"}
    assert all(panel["datasource"] == source for panel in DASHBOARD["panels"])


def test_panels_have_room() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        spot = panel["gridPos"]
        assert spot["x"] >= 0 and spot["w"] > 0 and spot["h"] > 0 and spot["x"] + spot["w"] <= 24, panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0, panel["title"]
    for a, b in combinations(panels, 2):
        one, other = a["gridPos"], b["gridPos"]
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (a["title"], b["title"])
