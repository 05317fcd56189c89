"""The rows and columns of the matrix, and what becomes of a cell."""

from typing import Literal, NamedTuple

import msgspec

FEATURES = {
    "chat": "chat",
    "stream": "stream",
    "tools": "tools",
    "json_schema": "JSON schema",
    "embeddings": "embeddings",
    "logprobs": "log-probabilities",
}
NODE = "node"


class Client(NamedTuple):
    """`environment` has the pins of `packages`: a file of `environments/`. The first package is the client itself."""

    name: str
    driver: str
    environment: str
    packages: tuple[str, ...]


CLIENTS = (
    Client("OpenAI, Python", "openai_client.py", "openai-3", ("openai",)),
    Client("OpenAI, Python, Responses API", "openai_responses.py", "openai-3", ("openai",)),
    Client("OpenAI, JavaScript", "openai_node.mjs", NODE, ("openai",)),
    Client("Anthropic, Python", "anthropic_client.py", "openai-3", ("anthropic",)),
    Client("LangChain", "langchain_client.py", "openai-3", ("langchain-openai", "langchain-core")),
    Client(
        "LlamaIndex",
        "llamaindex_client.py",
        "openai-2",
        ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like", "llama-index-core"),
    ),
    Client("LiteLLM", "litellm_client.py", "litellm", ("litellm",)),
    Client("LiteLLM's proxy", "litellm_proxy.py", "openai-2", ("litellm", "openai")),
    Client("Instructor", "instructor_client.py", "litellm", ("instructor", "openai")),
    Client("Pydantic AI", "pydantic_ai_client.py", "openai-3", ("pydantic-ai-slim",)),
    Client("Vercel AI SDK", "ai_sdk.mjs", NODE, ("ai", "@ai-sdk/openai-compatible")),
    Client("DSPy", "dspy_client.py", "litellm", ("dspy", "litellm")),
    Client("LLM, command line", "llm_command.py", "openai-3", ("llm",)),
    Client("Inspect", "inspect_client.py", "openai-3", ("inspect-ai",)),
)


class Cell(msgspec.Struct, frozen=True):
    """`detail` says why a client does not have the feature, or what was wrong."""

    outcome: Literal["passed", "failed", "absent"]
    detail: str = ""


class Row(msgspec.Struct, frozen=True):
    """The cells of one client, by feature. A cell passed if it did with every model."""

    client: str
    versions: dict[str, str]
    cells: dict[str, Cell]


class Matrix(msgspec.Struct, frozen=True):
    date: str
    server: str
    models: list[str]
    python: str
    node: str
    rows: list[Row]


def combined(cells: dict[str, Cell]) -> Cell:
    """Return the cell of a feature from those of the models: one that failed makes it fail, and one that could not be
    asked is named."""
    details = [f"{model}: {cell.detail}" for model, cell in cells.items() if cell.detail]
    outcomes = {cell.outcome for cell in cells.values()}
    if outcomes == {"absent"}:
        return next(iter(cells.values()))
    return Cell("failed" if "failed" in outcomes else "passed", "; ".join(details))
