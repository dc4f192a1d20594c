"""What is in launch/ is what train.py takes."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

COMMANDS = {
    "slurm.sbatch": r"python train\.py \"\$@\"' train \\\n(.*?) \"\$@\"\n",
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


def test_the_jobset_has_as_many_processes_as_pods():
    (job,) = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == int(re.search(r"--processes (\d+)", commands("gke_jobset.yaml")[0])[1])
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
