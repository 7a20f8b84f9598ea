"""Workloads, peers, the load generator, the cluster simulator and the demo model's recipe."""
