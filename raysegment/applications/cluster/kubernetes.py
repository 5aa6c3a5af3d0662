"""Manifests for KubeRay: a RayJob or a RayCluster with an elastic group of workers, and what belongs to it.

Field names are those of KubeRay's ray.io/v1 (`raycluster_types.go`, `rayjob_types.go` of release 1.7). No secret is in a
manifest: the token and Redis's password are read from Secrets.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from typing import Any

import ray
import yaml

from raysegment.applications.cluster.options import STOP_S, KubernetesOptions

Manifest = dict[str, Any]
_USER = 1000  # of the image
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_worker_niceness": "0",
}


def render_kubernetes(options: KubernetesOptions, verbs: Collection[str], command: str) -> str:
    """The manifests as YAML documents, the Ray one last; `command` is what they were rendered with."""
    documents = [*_claim(options), *_redis(options), _network_policy(options), _ray(options, verbs)]
    head = [f"# {command}", *(f"# {line}" for line in _before(options))]
    return "\n".join(head) + "\n" + "---\n".join(yaml.safe_dump(document, sort_keys=False, width=120) for document in documents)


def _before(options: KubernetesOptions) -> list[str]:
    """What must exist before the manifests are applied."""
    make = f"kubectl -n {options.namespace} create secret generic"
    random = "\"$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')\""
    secrets = {options.token_secret: "auth_token"} if options.token_secret else {}
    if _keeps_in_redis(options):
        secrets[options.redis_secret] = "password"
    return [f"Before: {make} {name} --from-literal={key}={random}" for name, key in secrets.items()]


def _ray(options: KubernetesOptions, verbs: Collection[str]) -> Manifest:
    labels = _labels(options) | _queue_labels(options)
    metadata: Manifest = {"name": options.name, "namespace": options.namespace, "labels": labels}
    if options.queue_elastic:
        metadata["annotations"] = {"kueue.x-k8s.io/elastic-job": "true"}
    if options.kind == "cluster":
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": _cluster(options)}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": _job(options, verbs)}


def _job(options: KubernetesOptions, verbs: Collection[str]) -> Manifest:
    """The job. Its command runs in the head's pod: who ends that pod ends the job, and `backoffLimit` begins it again.

    A second beginning goes on from the newest checkpoint, for which `out` lies on the shared volume.
    """
    return {
        "entrypoint": shlex.join(["python", "-m", "raysegment", *options.words(verbs)]),
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": _submitter(options),
        "backoffLimit": options.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        **({"suspend": True} if options.queue else {}),  # until Kueue admits it
        "rayClusterSpec": _cluster(options),
    }


def _cluster(options: KubernetesOptions) -> Manifest:
    spec: Manifest = {"rayVersion": ray.__version__, "authOptions": _authentication(options)}
    if options.queue and not options.queue_elastic:  # Kueue admits what is asked for as a whole, and no autoscaler's wishes
        spec["enableInTreeAutoscaling"] = False
    else:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": options.idle_s,
            "upscalingMode": "Default",
            "securityContext": _container_security(),
            "resources": _resources({"cpu": "500m", "memory": "1Gi"}),
        }
    if options.kind == "cluster" and options.store != "none":
        spec["gcsFaultToleranceOptions"] = _store(options)
    return spec | {"headGroupSpec": _head(options), "workerGroupSpecs": [_workers(options)]}


def _authentication(options: KubernetesOptions) -> Manifest:
    return {"mode": "token", **({"secretName": options.token_secret} if options.token_secret else {})}


def _store(options: KubernetesOptions) -> Manifest:
    """Where the head's state outlives the head's pod."""
    if options.store == "rocksdb":
        return {"backend": "rocksdb", "storage": {"size": "1Gi", "deletionPolicy": "DeleteWithCluster"}}
    password = {"valueFrom": {"secretKeyRef": {"name": options.redis_secret, "key": "password"}}}
    return {"backend": "redis", "redisAddress": options.redis_address or f"{options.name}-redis:6379", "redisPassword": password}


def _head(options: KubernetesOptions) -> Manifest:
    """The head has no CPUs for Ray: nothing of a job runs there but its command and what asks for none."""
    container = _container(options, "ray-head", {"cpu": str(options.head_cpus), "memory": options.head_memory})
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"dashboard-host": options.dashboard_host, "num-cpus": "0", "num-gpus": "0"},
        "template": _pod(options, container),
    }


def _workers(options: KubernetesOptions) -> Manifest:
    """One pod per node of the fleet; a pod that is to go has Ray told, so that the members on it leave in good order."""
    amounts = {"cpu": str(options.cpus), "memory": options.memory}
    amounts |= {options.gpu_resource: str(options.gpus)} if options.gpus else {}
    container = _container(options, "ray-worker", amounts)
    container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    drain = ["raysegment", "cluster", "drain", f"deadline_s={options.warn_s - 10}"]
    container["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    fixed = options.queue and not options.queue_elastic
    return {
        "groupName": "workers",
        "replicas": options.nodes if fixed else options.min,
        "minReplicas": options.nodes if fixed else options.min,
        "maxReplicas": options.nodes,
        "rayStartParams": {},
        "template": _pod(options, container),
    }


# ---------------------------------------------------------------- pods


def _pod(options: KubernetesOptions, container: Manifest) -> Manifest:
    spec: Manifest = {
        "restartPolicy": "Never",  # the autoscaler and KubeRay replace pods
        "terminationGracePeriodSeconds": options.warn_s,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
            {"name": "ray", "emptyDir": {}},
        ],
    }
    if options.priority:
        spec["priorityClassName"] = options.priority
    return {"metadata": {"labels": _labels(options)}, "spec": spec}


def _container(options: KubernetesOptions, name: str, amounts: Manifest) -> Manifest:
    mounts = {"shared": options.mount, "memory": "/dev/shm", "ray": "/tmp/ray"}
    return {
        "name": name,
        "image": options.image,
        "env": [{"name": key, "value": value} for key, value in _ENVIRONMENT.items()],
        "resources": _resources(amounts),
        "securityContext": _container_security(),
        "volumeMounts": [{"name": key, "mountPath": path} for key, path in mounts.items()],
    }


def _submitter(options: KubernetesOptions) -> Manifest:
    """The pod that hands the command to the cluster; KubeRay fills in what it runs, and the token from its Secret."""
    container = {
        "name": "submitter",
        "image": options.image,
        "resources": _resources({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": _container_security(),
    }
    spec = {"restartPolicy": "Never", "securityContext": _pod_security(), "containers": [container]}
    return {"metadata": {"labels": _labels(options)}, "spec": spec}


def _resources(amounts: Manifest) -> Manifest:
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}}


def _labels(options: KubernetesOptions) -> dict[str, str]:
    return {"app.kubernetes.io/name": "raysegment", "app.kubernetes.io/instance": options.name}


def _queue_labels(options: KubernetesOptions) -> dict[str, str]:
    if not options.queue:
        return {}
    priority = {"kueue.x-k8s.io/priority-class": options.priority} if options.priority else {}
    return {"kueue.x-k8s.io/queue-name": options.queue, **priority}


# ---------------------------------------------------------------- beside it


def _metadata(options: KubernetesOptions, name: str) -> Manifest:
    return {"name": name, "namespace": options.namespace, "labels": _labels(options)}


def _claim(options: KubernetesOptions) -> list[Manifest]:
    if not options.claim_gib:
        return []
    spec: Manifest = {
        "accessModes": ["ReadWriteMany"],  # all nodes write checkpoints and read shards
        "resources": {"requests": {"storage": f"{options.claim_gib}Gi"}},
        **({"storageClassName": options.storage_class} if options.storage_class else {}),
    }
    return [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": _metadata(options, options.claim), "spec": spec}]


def _network_policy(options: KubernetesOptions) -> Manifest:
    """Pods talk with those of their own cluster; the operator alone comes from elsewhere, to the dashboard's port."""
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    ours = {"podSelector": {"matchLabels": _labels(options)}}
    ingress = [{"from": [ours]}, {"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]}]
    spec = {"podSelector": {"matchLabels": _labels(options)}, "policyTypes": ["Ingress"], "ingress": ingress}
    metadata = _metadata(options, options.name)
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _keeps_in_redis(options: KubernetesOptions) -> bool:
    return options.kind == "cluster" and options.store == "redis"


def _redis(options: KubernetesOptions) -> list[Manifest]:
    """A Redis for the head's state, unless there is one."""
    if not _keeps_in_redis(options) or options.redis_address:
        return []
    name = f"{options.name}-redis"
    selector = {"app.kubernetes.io/component": name}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    password = {"secretKeyRef": {"name": options.redis_secret, "key": "password"}}
    run = 'exec redis-server --dir /state --appendonly yes --requirepass "$REDIS_PASSWORD"'
    container = {
        "name": "redis",
        "image": "redis:7.4",
        "command": ["sh", "-c", run],
        "env": [{"name": "REDIS_PASSWORD", "valueFrom": password}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "resources": _resources({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "state", "mountPath": "/state"}],
    }
    pod = {"metadata": {"labels": _labels(options) | selector},
           "spec": {"securityContext": _pod_security(), "containers": [container]}}  # fmt: skip
    stateful = {"serviceName": name, "replicas": 1, "selector": {"matchLabels": selector}, "template": pod,
                "volumeClaimTemplates": [{"metadata": {"name": "state"}, "spec": claim}]}  # fmt: skip
    service = {"selector": selector, "ports": [{"name": "redis", "port": 6379}]}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(options, name), "spec": service},
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": _metadata(options, name), "spec": stateful},
    ]
