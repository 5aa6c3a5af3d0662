"""What runs raysegment on a cluster: job scripts for Slurm and LSF, manifests for Kubernetes, nodes awaited and drained."""
