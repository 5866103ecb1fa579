"""What tools/benchmark.py times: a file a topic, whose ``run`` prints what it finds and returns its timings."""
