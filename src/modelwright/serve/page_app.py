"""A server of one page of the studio alone, with neither an engine nor documents behind it."""

from pathlib import Path

from modelwright.serve.app import FrontDoor
from modelwright.serve.errors import install_handlers
from modelwright.serve.metrics import Metrics
from modelwright.serve.page import install_page, read_page
from modelwright.serve.web import FastAPI


def create_page_app(title: str, page: Path, first_file: str, allowed_hosts: tuple[str, ...] = ()) -> FastAPI:
    """Return an application that sends the page; the caller adds the routes that it asks.

    Args:
        title: Of the application.
        page: Folder of the web page's files.
        first_file: What ``/`` sends.
        allowed_hosts: Names to be called by, beside localhost; empty off loopback: any.

    Raises:
        ConfigError: The folder has no page.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    install_handlers(app)
    install_page(app, read_page(page), first_file)
    app.add_middleware(FrontDoor, metrics=Metrics(None), allowed_hosts=allowed_hosts)  # type: ignore[arg-type]
    return app
