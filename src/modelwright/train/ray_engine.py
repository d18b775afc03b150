"""A training run on the workers of a Ray cluster: the same recipe, the same layouts, started again when a worker dies.

Ray Train starts the workers, brings them together in one group and gives each its GPU; from there on they are ranks as
torchrun's are. When one dies, Ray ends the others and starts all of them anew, and the run goes on from its newest
checkpoint. On several machines the paths of the recipe must lie on storage that all of them see.

Source: https://docs.ray.io/en/latest/train/train.html. Not here: a number of workers that changes during the run.
"""

import tempfile
from typing import Any

import torch

from modelwright.base import distributed
from modelwright.base.errors import ConfigError, DeviceError, MissingExtraError
from modelwright.base.registry import lookup
from modelwright.train import METHODS


def train_on_ray(
    method: str, config: Any, num_workers: int, *, address: str | None = None, max_restarts: int = 3
) -> None:
    """Train as a recipe says, on the workers of Ray; the result is where the recipe says.

    Args:
        method: What the recipe names.
        config: Its settings; ``loop.checkpoint.every`` decides how much is done again after a restart.
        num_workers: Ranks; each gets a GPU where the cluster has some.
        address: Of a running cluster; None: one is started on this machine.
        max_restarts: How often all workers are started again before the run fails.

    Raises:
        MissingExtraError: Ray is not installed.
        DeviceError: The run failed more often than it may be started again.
    """
    if num_workers < 1:
        raise ConfigError(f"workers is {num_workers}; it must be at least 1.")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "Training with --engine ray") from error
    was_running = ray.is_initialized()
    if not was_running:
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        ray.init(log_to_driver=False, **options)
    has_gpu = ray.cluster_resources().get("GPU", 0) >= num_workers
    try:
        with tempfile.TemporaryDirectory() as kept:  # of Ray's own notes; ours are beside the model
            trainer = TorchTrainer(
                _work,
                train_loop_config={"method": method, "config": config},
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo"),
                scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=has_gpu),
                run_config=RunConfig(storage_path=kept, failure_config=FailureConfig(max_failures=max_restarts)),
            )
            trainer.fit()
    except Exception as error:
        raise DeviceError(
            f"The run on {num_workers} workers of Ray failed: {error}. It was started again up to {max_restarts} "
            "times; what was saved stays, --resume goes on with it."
        ) from error
    finally:
        if not was_running:
            ray.shutdown()


def _work(settings: dict[str, Any]) -> None:
    """Do the work of one worker. A run that was begun is taken up by the method itself."""
    if torch.cuda.is_available():
        torch.cuda.set_device(torch.cuda.current_device())
    with distributed.join():
        lookup(METHODS, settings["method"], "method")(settings["config"], hooks=[])
