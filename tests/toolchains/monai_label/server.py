"""A MONAI Label server of its own, with the monaibundle app, and the few HTTP calls that the test makes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from email import message_from_bytes
from email.message import Message
from pathlib import Path

BOUNDARY = "one-file"


class Server:
    """The server at `url`, whose app and log lie in `folder`."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.models = folder / "monaibundle" / "model"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")

    def call(self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"):
        """Headers and body of an answer, or an error that shows the server's own words."""
        headers = {"Content-Type": content_type} if body is not None else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read()[:500]}\n{self.log[-3000:]}") from error

    def get(self, path: str) -> dict | list:
        return json.loads(self.call("GET", path)[1])

    def infer(self, model: str, image: str, **params) -> tuple[dict, bytes]:
        """`POST /infer/{model}?image=...`: the result's parameters and the mask as a NIfTI file."""
        form = urllib.parse.urlencode({"params": json.dumps(params)}).encode()
        path, content_type = f"/infer/{model}?image={image}", "application/x-www-form-urlencoded"
        headers, body = self.call("POST", path, form, content_type)
        answer = message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
        parts = {_name_of(part): part.get_payload(decode=True) for part in answer.get_payload()}
        return json.loads(parts["params"]), parts["image"]

    def save_label(self, image: str, label: Path) -> dict:
        """`PUT /datastore/label?image=...` of a file."""
        head = f'Content-Disposition: form-data; name="label"; filename="{label.name}"'
        lines = [f"--{BOUNDARY}", head, "Content-Type: application/octet-stream", "", ""]
        body = "\r\n".join(lines).encode() + label.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()
        content_type = f"multipart/form-data; boundary={BOUNDARY}"
        return json.loads(self.call("PUT", f"/datastore/label?image={image}", body, content_type)[1])

    def train(self, model: str, **request) -> dict:
        """`POST /train/{model}`, and `GET /train/` until that has ended."""
        task = json.loads(self.call("POST", f"/train/{model}", json.dumps(request).encode())[1])
        deadline = time.monotonic() + 900
        while task["status"] in ("SUBMITTED", "RUNNING") and time.monotonic() < deadline:
            time.sleep(1)
            task = self.get("/train/")
        return task


def _name_of(part: Message) -> str | None:
    return part.get_param("name", header="content-disposition")


@contextlib.contextmanager
def serve(python: Path, bundles: Mapping[str, Path], studies: Path, folder: Path) -> Iterator[Server]:
    """Runs the commands of docs/monai_label.md in `folder`; it and what it started are stopped in every case."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    options = {"cwd": folder, "env": environment}
    subprocess.run("monailabel apps --download --name monaibundle --output .".split(), check=True, **options)
    for name, bundle in bundles.items():
        shutil.copytree(bundle, folder / "monaibundle" / "model" / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"monailabel start_server --app monaibundle --studies {studies} --host 127.0.0.1 --port {port}".split()
    conf = {"models": ",".join(bundles), "zoo_source": "local", "sam2": "false"}
    command += [word for key, value in conf.items() for word in ("--conf", key, value)]
    print("$", *command)
    server = Server(f"http://127.0.0.1:{port}", folder)
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
    try:
        _wait_for(server, process)
        yield server
    finally:
        _stop(process)


def _wait_for(server: Server, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            server.get("/info/")
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log[-5000:]}")


def _stop(process: subprocess.Popen) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)  # with a training that may still run
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
