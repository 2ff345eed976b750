"""The files of deploy/: they parse, fit together, and name nothing that the code doesn't know."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from coldpress.flows.deployment import ENTRYPOINT

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env")
POOLS = {path.parent.name: json.loads(path.read_text()) for path in DEPLOY.glob("*/pool.json")}


def seconds(text: Any) -> int:
    return int(str(text).removesuffix("s"))


def compose(name: str = "compose.yaml") -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def source() -> str:
    """All code, as one text."""
    return "\n".join(
        path.read_text() for folder in ("flows", "storage", "tasks") for path in (ROOT / folder).rglob("*.py")
    )


def of_env_file() -> set[str]:
    return set(re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))


def test_every_variable_is_one_that_coldpress_or_prefect_reads() -> None:
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_valid_setting_names

    text = "\n".join(path.read_text() for path in FILES)
    code = source()
    ours = set(re.findall(r"\bCOLDPRESS_[A-Z_]+[A-Z]", text)) - {"COLDPRESS_AUTH", "COLDPRESS_LIMIT"}
    assert {name for name in ours if f'"{name}"' not in code} == set()
    theirs = set(re.findall(r"\bPREFECT_[A-Z_]+[A-Z]", text))
    assert theirs - set(_get_valid_setting_names(Settings)) == set()
    assert {"COLDPRESS_AUTH", "COLDPRESS_LIMIT"} <= of_env_file()


def test_what_compose_takes_from_the_environment_is_in_the_example_and_secrets_are_nowhere_else() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == of_env_file()
    assert not re.search(r"\$\{\w*(AUTH|PASSWORD|SECRET|TOKEN)\w*:-[^}]", text)
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().split()
    assert compose()["services"]["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"].startswith(
        "${COLDPRESS_AUTH:?"
    )


def test_services_depend_on_services_and_use_declared_volumes() -> None:
    document = compose()
    services = document["services"]
    for service in services.values():
        for other, condition in service.get("depends_on", {}).items():
            assert condition["condition"] != "service_healthy" or "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in document["volumes"]
    assert set(compose("compose.gpu.yaml")["services"]) <= set(services)


def test_whoever_stops_a_run_waits_longer_than_it_needs_to_keep_its_work() -> None:
    worker = compose()["services"]["worker"]
    assert seconds(worker["stop_grace_period"]) > seconds(worker["environment"]["COLDPRESS_GRACE_SECONDS"]) + 10
    variables = POOLS["kubernetes"]["variables"]["properties"]
    grace = seconds(variables["env"]["default"]["COLDPRESS_GRACE_SECONDS"])
    assert variables["termination_grace_seconds"]["default"] > grace + 15
    script = (DEPLOY / "slurm/coldpress.sbatch").read_text()
    (warning,), (ours,) = re.findall(r"--signal=TERM@(\d+)", script), re.findall(r"GRACE_SECONDS:-(\d+)", script)
    assert int(warning) > int(ours) + 15


@pytest.mark.parametrize("pool", sorted(POOLS))
def test_a_pools_template_uses_each_of_its_variables(pool: str) -> None:
    template = POOLS[pool]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_a_kubernetes_run_has_gpus_shared_memory_and_the_stores_credentials() -> None:
    spec = POOLS["kubernetes"]["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(mounted) == set(volumes)
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    assert mounted["shared-memory"] == "/dev/shm"
    assert container["envFrom"] == [{"secretRef": {"name": "{{ secret }}"}}]
    secret = yaml.safe_load((DEPLOY / "kubernetes/secrets.example.yaml").read_text())
    assert secret["metadata"]["name"] == POOLS["kubernetes"]["variables"]["properties"]["secret"]["default"]
    worker = list(yaml.safe_load_all((DEPLOY / "kubernetes/worker.yaml").read_text()))[-1]
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    for entry in container["env"]:
        if "valueFrom" in entry:
            assert entry["valueFrom"]["secretKeyRef"]["key"] in secret["stringData"]


def test_deployments_run_the_flow_on_pools_that_have_a_template() -> None:
    document = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())
    for deployment in document["deployments"]:
        assert deployment["entrypoint"] == ENTRYPOINT
        assert deployment["work_pool"]["name"] == deployment["name"]  # as `submit --pool` looks it up
        assert deployment["name"] in POOLS
    assert document["pull"] == []


def test_the_image_has_all_that_the_package_is_built_from() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {name for names in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for name in names.split()}
    assert {f"!{name}" for name in copied} <= set(sent)
    assert {"flows", "storage", "tasks", "pyproject.toml", "LICENSE", "README.md"} <= copied
    extras = re.findall(r"\.\[([\w,-]+)\]", dockerfile)[0].split(",")
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_code_that_comes_with_a_model_is_never_run() -> None:
    assert set(re.findall(r"trust_remote_code\s*=\s*([^,)\s]+)", source())) <= {"False"}


@pytest.fixture
def slurm(tmp_path: Path) -> Any:
    """Starts the batch script with stand-ins for Slurm's commands and a run that ends with the status given."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@" > srun.txt\ntrap "" TERM\nsleep "$PAUSE"\nexit "$STATUS"\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > scontrol.txt\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)

    def start(status: int, pause: float = 0, **settings: str) -> subprocess.Popen[str]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "STATUS": str(status), "PAUSE": str(pause), "SLURM_JOB_ID": "17", **settings}
        command = ["bash", str(DEPLOY / "slurm/coldpress.sbatch"), "recipe.yaml", "--slots", "2"]
        return subprocess.Popen(command, cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (143, True)])
def test_slurm_queues_a_job_again_exactly_when_it_was_pre_empted(
    slurm: Any, tmp_path: Path, status: int, again: bool
) -> None:
    process = slurm(status, COLDPRESS_STORE="/store")
    process.communicate(timeout=30)
    assert process.returncode == status
    assert "coldpress run recipe.yaml --slots 2" in (tmp_path / "srun.txt").read_text()
    assert (tmp_path / "scontrol.txt").exists() == again


def test_slurms_signal_to_the_script_does_not_keep_it_from_queueing_again(slurm: Any, tmp_path: Path) -> None:
    process = slurm(143, 1, COLDPRESS_STORE="/store")
    while not (tmp_path / "srun.txt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 17\n"


def test_slurm_without_a_store_is_told_to_name_one(slurm: Any) -> None:
    _, said = slurm(0).communicate(timeout=30)
    assert "set it to a folder that all nodes see" in said
