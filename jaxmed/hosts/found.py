"""Which cluster says who takes part. JAX reads it; this says what JAX will find, and what is missing where it finds nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

WAYS = (
    "Three ways: start by srun in a Slurm job, or by mpirun of Open MPI 4; run as an indexed Job or JobSet in Kubernetes, or on Cloud TPU "
    "hosts; or give every process HOST:PORT,COUNT,NUMBER. scripts/launch has a script for each."
)


@dataclass(frozen=True)
class Cluster:
    """A cluster that JAX knows.

    Attributes:
        name: its name.
        needs: environment variables that JAX needs, all of them; the first alone shows that the process may run there.
        package: a Python package that JAX needs too.
        otherwise: what to do where something is missing.
    """

    name: str
    needs: tuple[str, ...]
    package: str = ""
    otherwise: str = ""


CLUSTERS = (
    Cluster(
        "Open MPI",
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
        otherwise="Open MPI 5 does not say where process 0 is: give --hosts HOST:PORT,$OMPI_COMM_WORLD_SIZE,$OMPI_COMM_WORLD_RANK.",
    ),
    Cluster(
        "Slurm",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        otherwise="Start the command by srun.",
    ),
    Cluster(
        "GKE's TPU hosts",
        ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
        "libtpu",
        "Install JAX for TPUs, and let the pod ask for google.com/tpu.",
    ),
    Cluster(
        "Kubernetes",
        ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
        "kubernetes",
        "Install jax[k8s], let the Job be indexed, and let its service account read pods, jobs and services; or give "
        "--hosts HOST:PORT,COUNT,$(JOB_COMPLETION_INDEX).",
    ),
)
"""In JAX's order. Cloud TPU hosts outside of Kubernetes have no variables: their metadata server says who takes part."""


def missing(cluster: Cluster, environment: Mapping[str, str]) -> list[str]:
    """What JAX needs of a cluster and does not find."""
    lacks = [name for name in cluster.needs if name not in environment]
    return lacks + [f"the package {name}" for name in [cluster.package] if name and find_spec(name) is None]


def find_cluster(environment: Mapping[str, str]) -> str:
    """The name of the cluster that JAX will find; empty: none by variables."""
    return next((cluster.name for cluster in CLUSTERS if not missing(cluster, environment)), "")


def why_none(environment: Mapping[str, str]) -> str:
    """What is there of each cluster, what is missing, and the ways there are."""
    near = [
        f"{cluster.name}: {', '.join(missing(cluster, environment))} missing. {cluster.otherwise}"
        for cluster in CLUSTERS
        if cluster.needs[0] in environment
    ]
    return " ".join(["nothing says which processes take part.", *near, WAYS])


def idle_gpus(environment: Mapping[str, str]) -> str:
    """A notice where Slurm starts fewer processes on this node than it has GPUs, of which JAX gives each process one; or empty."""
    gpus, tasks = environment.get("SLURM_GPUS_ON_NODE", ""), environment.get("SLURM_NTASKS_PER_NODE", "")
    if not (gpus.isdecimal() and tasks.isdecimal()) or "JAX_LOCAL_DEVICE_IDS" in environment or int(tasks) >= int(gpus):
        return ""
    return f"JAX gives each process of a Slurm job one GPU: {tasks} of {gpus} on a node are used. Start {gpus} tasks per node."
