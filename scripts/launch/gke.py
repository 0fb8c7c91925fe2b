"""Submits a jaxmed command to a GKE cluster as a JobSet, made from jobset.yaml: one pod per host, one process per pod.

python scripts/launch/gke.py --name big --image IMAGE --claim runs --tpu tpu-v5-lite-podslice --topology 4x4 --chips 4 \
    -- jaxmed sweep --unit neuron --out /runs/big
python scripts/launch/gke.py --name big --image IMAGE --claim runs --gpu nvidia-h100-80gb --gpus 8 --hosts 2 \
    -- jaxmed sweep --unit neuron --out /runs/big
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from string import Template

from arguments import NAME, Parser, checked, need, refuse, resumed, run, show

PORT = 8476
EXCLUSIVE = "\n  annotations:\n    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
"""A slice is a node pool: all pods of the job go to one."""
WORDS = (
    ("name", "", "the JobSet"),
    ("namespace", "default", ""),
    ("image", "", "a container that has jaxmed, with JAX for these devices"),
    ("claim", "", "a PersistentVolumeClaim that all pods may write to: what they share"),
    ("mount", "/runs", "where it is mounted; --out lies in it"),
    ("tpu", "", "TPU nodes: their label gke-tpu-accelerator"),
    ("topology", "", "TPU nodes: their label gke-tpu-topology, such as 4x4"),
    ("gpu", "", "GPU nodes: their label gke-accelerator"),
)
NUMBERS = (("chips", 4, "TPU chips of a host"), ("gpus", 8, "GPUs of a host"), ("hosts", 0, "GPU hosts"), ("restarts", 10, "at most"))


def main() -> int:
    """Reads the flags, then prints or submits one manifest."""
    parser = Parser("A jaxmed command as a JobSet in GKE.")
    for name, default, told in WORDS:
        parser.add_argument(f"--{name}", default=default, help=told)
    for name, default, told in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, help=told)
    flags, command = parser.read()
    for name in ("name", "namespace", "claim"):
        need(rf"(?=.{{1,40}}$){NAME}", f"--{name}", getattr(flags, name), "1 to 40 lower-case letters, digits and hyphens")
    need(r"[\w./:@-]+", "--image", flags.image, "the name of a container image")
    need(r"/[\w./-]+", "--mount", flags.mount, "an absolute folder")
    need(r"\d+", "--restarts", str(flags.restarts), "a whole number from 0")
    text = manifest(flags, resumed(checked(command)))
    words = ["kubectl", "create", "-f", "-"]
    if flags.dry_run:
        show(words, text)
        return 0
    return run(words, text)


def manifest(flags: argparse.Namespace, command: Sequence[str]) -> str:
    """The JobSet: JSON is YAML, so values are filled in as JSON."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    out = words[words.index("--out") + 1] if "--out" in words[:-1] else ""
    workdir = flags.workdir or flags.mount
    if not out or ".." in out or PurePosixPath(flags.mount) not in PurePosixPath(workdir, out).parents:
        refuse(f"--out {out!r} is not in the shared folder {flags.mount}. Pods keep nothing else: give --out {flags.mount}/NAME.")
    hosts, nodes, limits = devices(flags)
    together = "auto" if flags.tpu else f"{flags.name}-hosts-0-0.{flags.name}:{PORT},{hosts},$(JOB_COMPLETION_INDEX)"
    pairs = [one.partition("=") for one in flags.env]
    given = {
        "annotations": EXCLUSIVE if flags.tpu else "",
        "hosts": str(hosts),
        "restarts": str(flags.restarts),
        **{name: json.dumps(getattr(flags, name)) for name in ("name", "namespace", "claim", "image", "mount")},
        "nodes": json.dumps(nodes),
        "limits": json.dumps(limits),
        "workdir": json.dumps(workdir),
        "command": json.dumps([*(word.replace("$", "$$") for word in command), "--hosts", together]),
        "env": json.dumps([{"name": name, "value": value.replace("$", "$$")} for name, _, value in pairs]),
    }
    return Template(Path(__file__).with_name("jobset.yaml").read_text(encoding="utf-8")).substitute(given)


def devices(flags: argparse.Namespace) -> tuple[int, dict[str, str], dict[str, int]]:
    """How many hosts, which nodes, and what each pod takes of them."""
    if bool(flags.tpu) == bool(flags.gpu):
        refuse("give --tpu with --topology and --chips, or --gpu with --gpus and --hosts.")
    label = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
    if flags.gpu:
        need(label, "--gpu", flags.gpu, "a label such as nvidia-h100-80gb")
        need(r"[1-9]\d*", "--gpus", str(flags.gpus), "how many a host has")
        need(r"[1-9]\d*", "--hosts", str(flags.hosts), "how many hosts")
        return flags.hosts, {"cloud.google.com/gke-accelerator": flags.gpu}, {"nvidia.com/gpu": flags.gpus}
    need(label, "--tpu", flags.tpu, "a label such as tpu-v5-lite-podslice")
    need(r"[1-9]\d*(x[1-9]\d*){1,2}", "--topology", flags.topology, "chips along each axis, such as 4x4 or 2x2x4")
    need(r"[1-9]\d*", "--chips", str(flags.chips), "how many a host has")
    chips = math.prod(map(int, flags.topology.split("x")))
    if chips % flags.chips or flags.hosts not in (0, chips // flags.chips):
        refuse(f"--topology {flags.topology} has {chips} chips: with --chips {flags.chips} these are {chips / flags.chips:g} hosts.")
    nodes = {"cloud.google.com/gke-tpu-accelerator": flags.tpu, "cloud.google.com/gke-tpu-topology": flags.topology}
    return chips // flags.chips, nodes, {"google.com/tpu": flags.chips}


if __name__ == "__main__":
    sys.exit(main())
