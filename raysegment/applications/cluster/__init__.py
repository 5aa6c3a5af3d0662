"""What runs raysegment on a cluster: job scripts, manifests, a practice cluster, what surrounds a submission, nodes."""
