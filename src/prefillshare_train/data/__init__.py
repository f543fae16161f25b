"""Sources to conversations to token spans."""

from prefillshare_train.data.answers import is_correct, parse_tool_calls
from prefillshare_train.data.config import DataConfig, SourceConfig
from prefillshare_train.data.errors import DataError, RowError, SeamError
from prefillshare_train.data.generation_header import require_headers
from prefillshare_train.data.pipeline import EvalExample, PreparedData, build_dataset, renderer_of
from prefillshare_train.data.readers import unlike_hub_id
from prefillshare_train.data.rendering import Renderer, make_renderer
from prefillshare_train.data.report import DataReport
from prefillshare_train.data.rows import Message, Row, Tool
from prefillshare_train.data.saved_renderer import base_renderer, saved_renderer
from prefillshare_train.data.template_checks import tools_left_out

__all__ = [
    "DataConfig",
    "DataError",
    "DataReport",
    "EvalExample",
    "Message",
    "PreparedData",
    "Renderer",
    "Row",
    "RowError",
    "SeamError",
    "SourceConfig",
    "Tool",
    "base_renderer",
    "build_dataset",
    "is_correct",
    "make_renderer",
    "parse_tool_calls",
    "renderer_of",
    "require_headers",
    "saved_renderer",
    "tools_left_out",
    "unlike_hub_id",
]
