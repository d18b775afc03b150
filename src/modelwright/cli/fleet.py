"""Front and replicas as one Ray Serve application, for `serve run` and for a cluster's RayService.

serve run modelwright.cli.fleet:build model=runs/model replicas=2
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.base.errors import ConfigError
from modelwright.cli.server import Plan, inside
from modelwright.engine.engine import EngineConfig
from modelwright.serve.served import Allowed, ServeConfig

if TYPE_CHECKING:
    from ray.serve import Application

KNOWN = (
    "model",
    "name",
    "replicas",
    "num_cpus",
    "num_gpus",
    "api_key_file",
    "quantize",
    "kv_dtype",
    "allow_media_hosts",
)


def build(args: dict[str, Any]) -> "Application":
    """Return the application.

    Args:
        args: ``model`` (a folder that every node has), and if wanted ``name``, ``replicas``, ``num_cpus`` and
            ``num_gpus`` of one replica, ``api_key_file``, ``quantize``, ``kv_dtype``, ``allow_media_hosts`` (a list).

    Raises:
        ConfigError: There is no model, or an argument is unknown.
        MissingExtraError: Ray is not installed.
    """
    unknown = next((name for name in args if name not in KNOWN), None)
    if unknown is not None or not args.get("model"):
        raise ConfigError(
            f"fleet: {unknown or 'model'} is {'unknown' if unknown else 'missing'}; known: {', '.join(KNOWN)}."
        )
    from modelwright.serve.replicas import ReplicaConfig, application  # Ray is an optional extra

    keys = args.get("api_key_file")
    config = ServeConfig(
        api_key_file=Path(keys) if keys else None,
        allowed=Allowed(media_hosts=tuple(args.get("allow_media_hosts") or ())),
    )
    engine = EngineConfig(quantize=args.get("quantize"), kv_dtype=args.get("kv_dtype"))
    model = str(args["model"])
    plan = Plan(config, model, None, str(args.get("name") or Path(model).name), engine=engine)
    fleet = ReplicaConfig(
        int(args.get("replicas", 2)), num_cpus=float(args.get("num_cpus", 1)), num_gpus=float(args.get("num_gpus", 0))
    )
    return application(replace(plan, config=inside(config)), fleet, config)
