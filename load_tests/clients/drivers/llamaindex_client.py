"""LlamaIndex's `OpenAILike` and `OpenAILikeEmbedding`."""

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
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

SERVER: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
KIND: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True}


def model(max_tokens: int = MAX_TOKENS, **options: Any) -> OpenAILike:
    return OpenAILike(model=MODEL, temperature=0, max_tokens=max_tokens, **options, **KIND, **SERVER)


def asked(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


def chat() -> Any:
    return model().chat(asked(TASK["question"])).message.content


def stream() -> Any:
    return {"deltas": [chunk.delta or "" for chunk in model().stream_chat(asked(TASK["question"]))]}


def tools() -> Any:
    tool = FunctionTool.from_defaults(
        lambda city, days: WEATHER["result"],
        name=WEATHER["name"],
        description=WEATHER["description"],
        fn_schema=Weather,
    )
    llm, question = model(JSON_TOKENS), asked(WEATHER["question"])
    response = llm.chat_with_tools([tool], chat_history=question, tool_required=True)
    *_, streamed = llm.stream_chat_with_tools([tool], chat_history=question, tool_required=True)
    made = llm.get_tool_calls_from_response(response)
    results = [
        ChatMessage(
            role="tool",
            content=str(tool.call(**each.tool_kwargs)),
            additional_kwargs={"tool_call_id": each.tool_id},
        )
        for each in made
    ]
    answer = model().chat([*question, response.message, *results])
    return {
        "calls": _calls(made),
        "streamed": _calls(llm.get_tool_calls_from_response(streamed)),
        "answer": answer.message.content,
    }


def _calls(made: Any) -> list[dict[str, Any]]:
    return [call(each.tool_name, each.tool_kwargs) for each in made]


def json_schema() -> Any:
    llm = model(JSON_TOKENS, should_use_structured_outputs=True)
    return llm.as_structured_llm(Person).chat(asked(PERSON["question"])).raw.model_dump()


def embeddings() -> Any:
    return OpenAILikeEmbedding(model_name=MODEL, **SERVER).get_text_embedding_batch(TEXTS)


def logprobs() -> Any:
    response = model(logprobs=True, top_logprobs=2).chat(asked(TASK["question"]))
    return [position[0].logprob for position in response.logprobs]


report(
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    embeddings=embeddings,
    logprobs=logprobs,
)
