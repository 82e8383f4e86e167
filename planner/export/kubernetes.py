"""A plan as manifests of Kubernetes: TrainingRuntime and TrainJob of Kubeflow Trainer, files as a ConfigMap.

Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1, release 2.3) replaces the PyTorchJob of the older training
operator (kubeflow.org/docs/components/trainer/operator-guides/migration). Its torch policy sets PET_* of
torchrun in the container that is named `node`; fields are those of its CRDs and of JobSet (v1alpha2).
"""

from __future__ import annotations

from typing import Any

from planner.export import artifact as facts
from planner.export.artifact import Export, ExportFile
from planner.export.native import grace_s
from planner.export.scheduled import Launched, job_name, nodes, run_s
from planner.export.text_files import yaml_text
from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan

FILE = "trainjob.yaml"
MOUNT = "/plan"
MOST_BYTES = 1_000_000
"""Of a ConfigMap: etcd's limit is 1 MiB for the whole object (kubernetes.io/docs/concepts/configuration)."""
IMAGE = "pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime"
"""The image of Trainer's own torch-distributed runtime (charts/kubeflow-trainer); it lacks the engine."""
RESOURCES = {
    "NVIDIA": "nvidia.com/gpu",
    "AMD": "amd.com/gpu",
    "Intel": "habana.ai/gaudi",
    "Google": "google.com/tpu",
}
"""Names of device plugins by vendor."""


def export_kubernetes(plan: Plan) -> Export:
    """One file of manifests, for kubectl apply; the engine's files are in it and beside it."""
    launched = Launched(plan)
    size = sum(len(file.text.encode()) for file in launched.files)
    if size > MOST_BYTES:
        raise InputError(
            Problem(
                where="--to kubernetes",
                fault=f"the plan's files have {size:,} bytes, and a ConfigMap holds {MOST_BYTES:,}.",
                legal="a plan of fewer stages and micro-batches",
                fix="mount them from a volume: --to the engine writes them",
            )
        )
    documents = (_files(plan, launched), _runtime(plan, launched), _job(plan))
    text = "---\n".join(yaml_text(document) for document in documents)
    comments = facts.comment([*facts.predictions(plan), "kubectl apply --server-side -f trainjob.yaml"])
    return Export(
        target="kubernetes",
        release="Kubeflow Trainer 2.3 (trainer.kubeflow.org/v1alpha1)",
        files=(ExportFile(name=FILE, text=comments + text), *launched.files),
        start=f"kubectl apply --server-side -f {FILE}",
        decides=(*launched.decides, "which nodes, and in which order: name a topology or a queue for it"),
        yours=(
            *launched.yours,
            f"the image, which must hold the engine ({IMAGE} does not), and a volume for RUN_DIR",
            "cpu and memory of a node's pod, and its network devices (rdma), where the cluster has them",
        ),
    )


def _files(plan: Plan, launched: Launched) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _name(plan)},
        "data": {file.name: file.text for file in launched.files},
    }


def _name(plan: Plan) -> str:
    return f"{job_name(plan)}-plan"


def _resources(plan: Plan) -> dict[str, Any]:
    """A node's devices. Raises InputError for those of which no device plugin is known."""
    device = plan.cluster.groups[0].device
    if device.name == "cpu":
        return {}
    if device.vendor not in RESOURCES:
        raise InputError(
            Problem(
                where="--to kubernetes",
                fault=f"no device plugin for {device.title} (vendor {device.vendor or 'unknown'}) is known.",
                legal=f"devices of {', '.join(RESOURCES)}, or a CPU",
            )
        )
    return {RESOURCES[device.vendor]: plan.cluster.devices_per_node}


def _runtime(plan: Plan, launched: Launched) -> dict[str, Any]:
    """What a node is: its pod, with shared memory for loaders and NCCL, and time to save in."""
    container = {
        "name": "node",
        "image": IMAGE,
        "command": ["bash", f"{MOUNT}/{launched.script}"],
        "env": [{"name": "RUN_DIR", "value": "/run-dir"}, {"name": "OMP_NUM_THREADS", "value": "1"}],
        "volumeMounts": [
            {"name": "plan", "mountPath": MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "run-dir", "mountPath": "/run-dir"},
        ],
    }
    pod = {
        "terminationGracePeriodSeconds": round(grace_s(plan)) + 30,
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {"name": "plan", "configMap": {"name": _name(plan)}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "run-dir", "persistentVolumeClaim": {"claimName": f"{job_name(plan)}-run"}},
        ],
    }
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "template": {"spec": pod}},
        },
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {
            "name": _name(plan),
            "labels": {"trainer.kubeflow.org/framework": "torch"},
        },
        "spec": {
            "mlPolicy": {"numNodes": nodes(plan), "torch": {}},
            "template": {"spec": {"failurePolicy": {"maxRestarts": 3}, "replicatedJobs": [node]}},
        },
    }


def _job(plan: Plan) -> dict[str, Any]:
    resources, limit_s = _resources(plan), run_s(plan)
    trainer: dict[str, Any] = {
        "numNodes": nodes(plan),
        "numProcPerNode": plan.cluster.devices_per_node,
    }
    if resources:
        trainer["resourcesPerNode"] = {"limits": resources, "requests": resources}
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": _name(plan),
        },
        "trainer": trainer,
    }
    if limit_s is not None:
        spec["activeDeadlineSeconds"] = round(2 * limit_s)
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": job_name(plan),
            "annotations": {"shardwise/strategy": plan.strategy.degrees.label()},
        },
        "spec": spec,
    }
