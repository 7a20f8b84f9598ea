"""The demo, the experiments it runs, the benchmarks, and the demo model's recipe."""
