"""Facts of KubeRay 1.7's ray.io/v1 schemas, as far as manifests here may touch them, as JSON Schemas; and the operator's rules.

Names, types, required fields and enumerations are those of `raycluster_types.go`, `rayjob_types.go` and of Kubernetes' pods.
Objects are closed: a name that is not listed is a mistake. (The API server drops such fields silently.)
"""

from __future__ import annotations

import re
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
LABEL: Schema = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"}
QUANTITIES: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^([0-9]+|[0-9]+\.[0-9]+)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"},
}


def enum(*values: str) -> Schema:
    return {"enum": list(values)}


def several(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def fields(required: str = "", **properties: Schema) -> Schema:
    """A closed object."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


METADATA = fields("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
KEY_OF_SECRET = fields("name key", name=TEXT, key=TEXT, optional=FLAG)
VALUE_FROM = fields(secretKeyRef=KEY_OF_SECRET, configMapKeyRef=KEY_OF_SECRET, fieldRef={"type": "object"})
VARIABLES = several(fields("name", name=TEXT, value=TEXT, valueFrom=VALUE_FROM))
RESOURCES = fields(requests=QUANTITIES, limits=QUANTITIES)
CONTAINER_SECURITY = fields(
    allowPrivilegeEscalation=FLAG, capabilities=fields(add=several(TEXT), drop=several(TEXT)), privileged=FLAG,
    readOnlyRootFilesystem=FLAG, runAsGroup=COUNT, runAsNonRoot=FLAG, runAsUser=COUNT, seccompProfile={"type": "object"},
)  # fmt: skip
POD_SECURITY = fields(
    fsGroup=COUNT, fsGroupChangePolicy=enum("OnRootMismatch", "Always"), runAsGroup=COUNT, runAsNonRoot=FLAG, runAsUser=COUNT,
    seccompProfile=fields("type", type=enum("RuntimeDefault", "Unconfined", "Localhost"), localhostProfile=TEXT),
    supplementalGroups=several(COUNT),
)  # fmt: skip
HANDLER = fields(
    exec=fields("command", command=several(TEXT, 1)), httpGet={"type": "object"}, sleep=fields("seconds", seconds=COUNT)
)
CONTAINER = fields(
    "name image",
    name=LABEL, image=TEXT, imagePullPolicy=enum("Always", "IfNotPresent", "Never"), command=several(TEXT), args=several(TEXT),
    env=VARIABLES, resources=RESOURCES, securityContext=CONTAINER_SECURITY, workingDir=TEXT,
    lifecycle=fields(preStop=HANDLER, postStart=HANDLER),
    ports=several(fields("containerPort", name={"type": "string", "maxLength": 15}, containerPort=COUNT, protocol=TEXT)),
    volumeMounts=several(fields("name mountPath", name=TEXT, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)  # fmt: skip
VOLUME = fields(
    "name",
    name=LABEL, emptyDir=fields(medium=enum("", "Memory"), sizeLimit=TEXT), secret=fields(secretName=TEXT),
    persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=FLAG), configMap={"type": "object"},
)  # fmt: skip
POD_TEMPLATE = fields(
    "spec",
    metadata=fields(labels=TEXTS, annotations=TEXTS),
    spec=fields(
        "containers",
        containers=several(CONTAINER, 1), initContainers=several(CONTAINER), volumes=several(VOLUME),
        restartPolicy=enum("Always", "OnFailure", "Never"), terminationGracePeriodSeconds=COUNT, priorityClassName=TEXT,
        securityContext=POD_SECURITY, serviceAccountName=TEXT, nodeSelector=TEXTS, tolerations=several({"type": "object"}),
        affinity={"type": "object"}, imagePullSecrets=several({"type": "object"}),
    ),
)  # fmt: skip

HEAD_GROUP = fields(
    "template",
    template=POD_TEMPLATE, rayStartParams=TEXTS, serviceType=enum("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    headService={"type": "object"}, enableIngress=FLAG, ingressOptions={"type": "object"}, resources=TEXTS, labels=TEXTS,
)  # fmt: skip
WORKER_GROUP = fields(
    "groupName minReplicas maxReplicas template",
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT, idleTimeoutSeconds=COUNT,
    priority=COUNT, rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS, scaleStrategy={"type": "object"}, suspend=FLAG,
    template=POD_TEMPLATE,
)  # fmt: skip
RAY_CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=TEXT, headGroupSpec=HEAD_GROUP, workerGroupSpecs=several(WORKER_GROUP), enableInTreeAutoscaling=FLAG,
    suspend=FLAG, managedBy=TEXT, headServiceAnnotations=TEXTS, networkPolicy={"type": "object"}, tlsOptions={"type": "object"},
    historyServerOptions={"type": "object"}, upgradeStrategy=fields(type=enum("Recreate", "None")),
    authOptions=fields(mode=enum("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=fields(
        version=enum("v1", "v2"), upscalingMode=enum("Default", "Aggressive", "Conservative"), idleTimeoutSeconds=COUNT,
        image=TEXT, imagePullPolicy=TEXT, securityContext=CONTAINER_SECURITY, resources=RESOURCES, env=VARIABLES,
        envFrom=several({"type": "object"}), volumeMounts=several({"type": "object"}), command=several(TEXT), args=several(TEXT),
    ),
    gcsFaultToleranceOptions=fields(
        backend=enum("redis", "rocksdb"), redisAddress=TEXT, externalStorageNamespace=TEXT,
        redisUsername=fields(value=TEXT, valueFrom=VALUE_FROM), redisPassword=fields(value=TEXT, valueFrom=VALUE_FROM),
        storage=fields(claimName=TEXT, size=TEXT, storageClassName=TEXT, accessModes=several(TEXT), subPath=TEXT,
                       deletionPolicy=enum("DeleteWithCluster", "Retain")),
    ),
)  # fmt: skip
RAY_JOB_SPEC = fields(
    entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT, metadata=TEXTS, rayClusterSpec=RAY_CLUSTER_SPEC, clusterSelector=TEXTS,
    submissionMode=enum("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), submitterPodTemplate=POD_TEMPLATE,
    submitterConfig=fields(backoffLimit=COUNT), backoffLimit=COUNT, activeDeadlineSeconds=COUNT,
    preRunningDeadlineSeconds=COUNT, ttlSecondsAfterFinished=COUNT, shutdownAfterJobFinishes=FLAG, suspend=FLAG, managedBy=TEXT,
    deletionStrategy={"type": "object"}, entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
)  # fmt: skip

CLAIM_SPEC = fields(
    "accessModes resources",
    accessModes=several(enum("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), 1),
    resources=RESOURCES, storageClassName=TEXT,
)  # fmt: skip
SELECTOR = fields(matchLabels=TEXTS, matchExpressions=several({"type": "object"}))
PEERS = several(fields(podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock={"type": "object"}))
PORTS = several(fields(protocol=enum("TCP", "UDP", "SCTP"), port=COUNT))
SPECS = {
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER_SPEC,
    ("ray.io/v1", "RayJob"): RAY_JOB_SPEC,
    ("v1", "PersistentVolumeClaim"): CLAIM_SPEC,
    ("v1", "Service"): fields("ports", selector=TEXTS, ports=several(fields("port", name=TEXT, port=COUNT)), type=TEXT),
    ("apps/v1", "StatefulSet"): fields(
        "selector serviceName template", selector=SELECTOR, serviceName=TEXT, replicas=COUNT, template=POD_TEMPLATE,
        volumeClaimTemplates=several(fields("metadata spec", metadata=METADATA, spec=CLAIM_SPEC)),
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): fields(
        "podSelector", podSelector=SELECTOR, policyTypes=several(enum("Ingress", "Egress")),
        ingress=several(fields(**{"from": PEERS, "ports": PORTS})), egress=several({"type": "object"}),
    ),
}  # fmt: skip


def problems(document: dict[str, Any]) -> list[str]:
    """What the API server or the operator would not take, or would drop; none for a good manifest."""
    spec = SPECS[(document["apiVersion"], document["kind"])]
    whole = fields("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec)
    found = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in Draft202012Validator(whole).iter_errors(document)
    ]
    rules = {"RayJob": _job_rules, "RayCluster": lambda held: _cluster_rules(held["spec"])}.get(document["kind"])
    return found or (rules(document) if rules else [])


def _job_rules(document: dict[str, Any]) -> list[str]:
    """`ValidateRayJobSpec` of the operator."""
    spec = document["spec"]
    wrong = {
        "a suspended RayJob needs shutdownAfterJobFinishes": spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"),
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes":
            spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"),
        "one of rayClusterSpec and clusterSelector": ("rayClusterSpec" in spec) == ("clusterSelector" in spec),
        "the name is too long or no DNS label":
            not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"]),
        "a submitter's pod must end": spec.get("submitterPodTemplate", {"spec": {}})["spec"].get("restartPolicy") == "Always",
    }  # fmt: skip
    return [rule for rule, broken in wrong.items() if broken] + _cluster_rules(spec.get("rayClusterSpec", {}))


def _cluster_rules(spec: dict[str, Any]) -> list[str]:
    """`ValidateRayClusterSpec` of the operator."""
    groups = spec["workerGroupSpecs"]
    pods = [spec["headGroupSpec"], *groups]
    version = tuple(map(int, spec.get("rayVersion", "0.0.0").split(".")))
    store = spec.get("gcsFaultToleranceOptions", {})
    second = spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("version") == "v2"
    wrong = {
        "a token needs Ray 2.52 or newer": spec.get("authOptions", {}).get("mode") == "token" and version < (2, 52, 0),
        "minReplicas above maxReplicas": any(group["minReplicas"] > group["maxReplicas"] for group in groups),
        "replicas outside": any(not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups),
        "autoscaler v2 wants pods that stay down":
            second and any(pod["template"]["spec"].get("restartPolicy", "Never") != "Never" for pod in pods),
        "rocksdb beside Redis's fields": store.get("backend") == "rocksdb" and {"redisAddress", "redisPassword"} & set(store),
        "a redis without an address": store.get("backend") == "redis" and not store.get("redisAddress"),
        "resources twice": any(group.get("resources") and "num-cpus" in group["rayStartParams"] for group in pods),
    }  # fmt: skip
    return [rule for rule, broken in wrong.items() if broken]
