"""The image of a plan: vLLM's own, with this package beside it."""

from __future__ import annotations

_TEXT = """\
# docker build -t {image} .
#
# For a version of your own: `make build` in the repository, copy dist/*.whl beside this file, and
#   docker build -t {image} --build-arg PACKAGE=/build/NAME.whl .
FROM {upstream}
ARG PACKAGE=prefillshare-train=={version}
COPY . /build
# Without dependencies: vLLM has brought what is used here, in the versions that it needs.
RUN python3 -m pip install --no-cache-dir --no-deps "$PACKAGE" && rm -rf /build
RUN python3 -c "import nixl" || python3 -m pip install --no-cache-dir nixl
# Fails here and not in the cluster, where something is missing.
RUN python3 -c "import prefillshare_train.engines.vllm.router.config, \\
    prefillshare_train.engines.vllm.prefill_id"
"""


def dockerfile(image: str, upstream: str, version: str) -> str:
    """The file.

    Args:
        image: name of what it builds.
        upstream: what it starts from.
        version: of this package.
    """
    return _TEXT.format(image=image, upstream=upstream, version=version)
