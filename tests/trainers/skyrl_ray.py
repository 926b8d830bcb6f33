"""Runs a main file of SkyRL with Ray's workers, on a CPU: `python skyrl_ray.py METRICS MAIN OPTION...`.

The metrics of each step are appended to the file METRICS. Ray is told of two GPUs, which do not exist.
"""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial
from typing import Any

import ray
import skyrl_cpu
from skyrl.train import trainer
from skyrl.train.utils import utils


class Trainer(trainer.RayPPOTrainer):
    def build_models(self, *_: Any) -> None:
        policy, ref = map(ray.remote(num_gpus=1), (skyrl_cpu.PolicyWorker, skyrl_cpu.RefWorker))
        super().build_models(policy, None, ref)


class Experiment(skyrl_cpu.Experiment):
    """An experiment in a task of Ray, which SkyRL's `main` starts."""

    def get_trainer(self, **options: Any) -> Any:
        return Trainer(**options)

    def get_tracker(self) -> Any:
        return self

    def log(self, data: dict[str, Any], **_: Any) -> None:
        with open(self.cfg.trainer.run_name, "a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")

    def finish(self) -> None:
        pass

    def log_exception(self, *_: Any, **__: Any) -> None:
        pass


if __name__ == "__main__":
    import skyrl_ray  # under its own name, by which Ray's workers import it

    skyrl_cpu.main_base.BasePPOExp = skyrl_ray.Experiment
    utils.peer_access_supported = lambda **_: True  # it asks CUDA
    ray.init = partial(ray.init, num_cpus=4, num_gpus=2, include_dashboard=False)
    _, metrics, main, *options = sys.argv
    sys.argv = [main, *options, f"trainer.run_name={metrics}"]
    runpy.run_path(main, run_name="__main__")
