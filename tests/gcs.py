"""Google's object store on this machine, by its own protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import pytest
from flaky import BUCKET
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

_upload = objects._multipart_upload


def _conditional_upload(request: Any, response: Any, storage: Any) -> None:
    """With the condition that the emulator ignores: none of this name may exist."""
    if request.query.get("ifGenerationMatch") == ["0"]:
        with suppress(NotFound):
            storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    _upload(request, response, storage)  # one request at a time: nothing comes in between


@pytest.fixture(scope="session")
def gs() -> Iterator[None]:
    """Clients of this process and its children find an empty bucket."""
    for noisy in ("gcsfs", "gcsfs.core", "gcsfs.extended_gcsfs"):
        logging.getLogger(noisy).setLevel(logging.ERROR)  # that the bucket's type cannot be asked for
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "_multipart_upload", _conditional_upload)
        server.start()
        host, port = server._api._httpd.server_address[:2]
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield
        server.stop()
