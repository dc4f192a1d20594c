"""What is in launch/ is what train.py takes."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

COMMANDS = {
    "slurm.sbatch": r"python train\.py \"\$@\"' train \\\n(.*?) \"\$@\" \|\| status",
    "gke_jobset.yaml": None,
    "README.md": r"(?:&& |\")python train\.py (.*?)\"",
}
DEVICES = {"slurm.sbatch": [4 * 8], "gke_jobset.yaml": [4 * 8], "README.md": [32, 2 * 32]}  # of each command


def commands(name):
    text = (ROOT / "launch" / name).read_text()
    if name.endswith(".yaml"):
        (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return [container["args"][0].removeprefix("exec python train.py ")]
    return re.findall(COMMANDS[name], text, re.S)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_are_those_of_train(name, monkeypatch):
    import train

    monkeypatch.chdir(ROOT)
    found = commands(name)
    for command, devices in zip(found, DEVICES[name], strict=True):
        given = command.replace("$JOB_COMPLETION_INDEX", "3").replace('"$config"', "configs/svdp_sd35m.py").replace('"$workdir"', "run")
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(given)])
        config, workdir, cluster = train.parse()
        assert (config.mesh.context, config.mesh.tensor) == (1, 1) and config.train.batch % (devices * config.train.accumulation) == 0
        assert config.mesh.strategy == "fsdp" and config.mesh.data == -1 and workdir
        assert cluster.process == (3 if "jobset" in name else None)


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)


@pytest.mark.parametrize(("status", "queued_again"), [(0, False), (75, True), (1, False)])
def test_the_slurm_script_is_queued_again_where_the_run_asks_for_it(tmp_path, status, queued_again):
    for name, does in ("srun", f"exit {status}"), ("scontrol", f"echo $@ > {tmp_path / 'said'}"):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "5"}
    done = subprocess.run(["bash", ROOT / "launch" / "slurm.sbatch", "config.py", "gs://bucket/run"], env=variables)
    assert done.returncode == status and (tmp_path / "said").exists() == queued_again


def test_the_jobset_has_as_many_processes_as_pods():
    (job,) = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == int(re.search(r"--processes (\d+)", commands("gke_jobset.yaml")[0])[1])
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
