"""From measured points on few GPUs to throughput, time and goodput on many: pure functions of frozen values."""
