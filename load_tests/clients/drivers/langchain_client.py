"""LangChain's `langchain-openai`."""

from typing import Any

from driver import (
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    PERSON,
    TASK,
    TEXTS,
    URL,
    WEATHER,
    Person,
    Weather,
    call,
    report,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

SERVER: dict[str, Any] = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0}


def model(max_tokens: int = MAX_TOKENS, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(temperature=0, max_tokens=max_tokens, **options, **SERVER)


def chat() -> Any:
    return model().invoke(TASK["question"]).text


def stream() -> Any:
    return {"deltas": [chunk.text for chunk in model().stream(TASK["question"])]}


def tools() -> Any:
    tool = StructuredTool.from_function(
        lambda city, days: WEATHER["result"],
        name=WEATHER["name"],
        description=WEATHER["description"],
        args_schema=Weather,
    )
    with_tools = model(JSON_TOKENS).bind_tools([tool], tool_choice=WEATHER["name"])
    question = HumanMessage(WEATHER["question"])
    message = with_tools.invoke([question])
    streamed = None
    for chunk in with_tools.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    results = [ToolMessage(tool.invoke(made["args"]), tool_call_id=made["id"]) for made in message.tool_calls]
    answer = model().bind_tools([tool], tool_choice="none").invoke([question, message, *results])
    return {"calls": _calls(message), "streamed": _calls(streamed), "answer": answer.text}


def _calls(message: Any) -> list[dict[str, Any]]:
    return [call(made["name"], made["args"]) for made in message.tool_calls]


def json_schema() -> Any:
    structured = model(JSON_TOKENS).with_structured_output(Person, method="json_schema")
    return structured.invoke(PERSON["question"]).model_dump()


def embeddings() -> Any:
    # Without this check the client sends token ids of OpenAI's own tokenizer.
    return OpenAIEmbeddings(check_embedding_ctx_length=False, **SERVER).embed_documents(TEXTS)


def logprobs() -> Any:
    message = model(logprobs=True, top_logprobs=2).invoke(TASK["question"])
    return [token["logprob"] for token in message.response_metadata["logprobs"]["content"]]


report(
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    embeddings=embeddings,
    logprobs=logprobs,
)
