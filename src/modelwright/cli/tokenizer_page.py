"""``mw tokenizer page``: a web page that shows how tokenizers split what is typed, side by side."""

from pathlib import Path

from modelwright.base.progress import console
from modelwright.ops.tokenizers import name_tokenizers
from modelwright.serve.app import serve as run_server
from modelwright.serve.port import check_port
from modelwright.serve.tokenizers_app import create_tokenizers_app
from modelwright.studio import PAGE


def show_page(tokenizers: list[Path], host: str, port: int) -> None:
    """Serve the page until interrupted."""
    check_port(host, port)
    app = create_tokenizers_app(name_tokenizers(tokenizers), PAGE)
    shown = f"[{host}]" if ":" in host else host
    console.print(f"[bold]http://{shown}:{port}/[/bold]  the page. Ctrl-C ends.")
    try:
        run_server(app, host, port)
    except KeyboardInterrupt:  # Ctrl-C is how a server is meant to end
        console.print("stopped")
