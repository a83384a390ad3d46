"""torchrun --nproc_per_node N seconds.py RUN: seconds of an evaluation of a run's checkpoint, and its metrics."""
import json, sys, time
import numpy as np, torch
from hstu.observe.logging import quiet_libraries
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import choose_split, evaluate_split
quiet_libraries()
loaded = LoadedModel.load(sys.argv[1])
split = choose_split(loaded.with_data(), None)
wall, cpu = [], []
for _ in range(3):
    a, b = time.monotonic(), time.process_time()
    metrics = evaluate_split(loaded, split).metrics()
    wall.append(round(time.monotonic() - a, 2)); cpu.append(round(time.process_time() - b, 2))
if loaded.mesh.is_main:
    print(json.dumps({"run": sys.argv[1].split("run_")[-1], "ranks": loaded.mesh.world_size, "s": min(wall), "cpu_s": min(cpu), "all": [wall, cpu], "metrics": metrics}), flush=True)
