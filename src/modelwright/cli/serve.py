"""``mw serve``: the OpenAI-compatible server and the web page."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.errors import ConfigError
from modelwright.cli.server import Plan, named_folder, start_with
from modelwright.engine.engine import EngineConfig
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.hub import fetch
from modelwright.models.sentence import encoder_kind
from modelwright.serve.port import Address, check_port
from modelwright.serve.served import Allowed, ServeConfig


def serve(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub id; left out: the index alone.")] = None,
    index: Annotated[Path | None, typer.Option(help="Index that questions are answered from.")] = None,
    generate: Annotated[bool, typer.Option(help="The model writes the answers; otherwise they are quoted.")] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model; else its folder's name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    embedder: Annotated[str | None, typer.Option(help="Sentence encoder for /v1/embeddings, and the index.")] = None,
    reranker: Annotated[str | None, typer.Option(help="Cross-encoder for /v1/rerank and /v1/score.")] = None,
    speculate: Annotated[
        bool, typer.Option(help="Guess tokens that repeat earlier text and check several at once; same answers.")
    ] = False,
    draft: Annotated[str | None, typer.Option(help="A smaller model of the same tokens guesses; same answers.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Round keys and values in the cache: int8 or int4.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Round the weights while loading: int8, int4 or nf4.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Processes that compute the model together.")] = 1,
    adapters: Annotated[list[str] | None, typer.Option(help="LoRA adapters to serve: NAME=DIR NAME=DIR ...")] = None,
    adapter_dir: Annotated[Path | None, typer.Option(help="Clients may load adapters from folders in it.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Keys that may ask; make them with mw keys.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write every prompt and answer there, for mw replay.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Let pages of https://SITE ask; repeatable.")] = None,
    allow_media_host: Annotated[
        list[str] | None, typer.Option(help="Fetch pictures from HOST[:PORT]; repeatable.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain in PEM, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, where it stands in another file.")] = None,
    answer_timeout: Annotated[float, typer.Option(help="Seconds that a whole answer may take.")] = 3600.0,
    otlp: Annotated[str | None, typer.Option(help="OpenTelemetry collector for spans: http://localhost:4318.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where uploaded files and batches outlive the server.")] = None,
    replicas: Annotated[int, typer.Option(help="Processes that serve one model; above 1: --engine ray.")] = 1,
    engine: Annotated[str, typer.Option(help="What keeps the processes: local (one) or ray (Ray Serve).")] = "local",
) -> None:
    """Serve MODEL, an index, or both, with the OpenAI API under /v1 and the page at /.

    MODEL may also be a sentence encoder or a reranker, which then serves vectors or scores alone. On an NVIDIA GPU and
    with the extra gpu, attention is computed by Triton and decode steps are replayed (checked without a GPU so far).
    """
    check_port(host, port)
    config = ServeConfig(
        answer_mode="generated" if generate else "extractive",
        adapters=tuple(named_folder(text) for text in adapters or ()),
        adapter_dir=adapter_dir,
        api_key_file=api_key_file,
        state_dir=state_dir,
        answer_timeout_seconds=answer_timeout,
        trace_file=trace,
        otlp_endpoint=otlp,
        allowed=Allowed(origins=tuple(allow_origin or ()), media_hosts=tuple(allow_media_host or ())),
    )
    address = Address(host, port, tls_cert, tls_key)
    if speculate and draft is not None:
        raise ConfigError("--speculate and --draft are given together; one of them guesses. Leave one out.")
    guesses = SpeculationConfig("draft", draft=fetch(draft)) if draft is not None else SpeculationConfig()
    guess = guesses if speculate or draft is not None else None
    settings = EngineConfig(speculation=guess, quantize=quantize, kv_dtype=kv_dtype, tensor_parallel=tensor_parallel)
    kind = encoder_kind(fetch(model)) if model is not None else None
    encoders = (model if kind == "encoder" else embedder, model if kind == "reranker" else reranker)
    model = model if kind is None else None
    called = name or Path(model or index or encoders[0] or encoders[1] or "modelwright").name
    start_with(engine, Plan(config, model, index, called, embedder, settings, encoders), address, replicas)
