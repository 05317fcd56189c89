// OpenAI's JavaScript client.
import OpenAI from "openai";

import { JSON_TOKENS, KEY, MAX_TOKENS, MODEL, PERSON, TASK, TEXTS, URL, WEATHER, report } from "./driver.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY, maxRetries: 0 });
const COMMON = { model: MODEL, temperature: 0 };
const QUESTION = [{ role: "user", content: TASK.question }];
const WEATHER_QUESTION = [{ role: "user", content: WEATHER.question }];
const { name, description, parameters } = WEATHER;
const TOOLS = [{ type: "function", function: { name, description, parameters } }];
const NAMED = { type: "function", function: { name } };

const calls = (message) =>
  message.tool_calls.map((made) => ({ name: made.function.name, arguments: JSON.parse(made.function.arguments) }));

async function create(messages, options, max_completion_tokens = MAX_TOKENS) {
  const response = await client.chat.completions.create({ messages, max_completion_tokens, ...options, ...COMMON });
  return response.choices[0];
}

async function chat() {
  return (await create(QUESTION)).message.content;
}

async function stream() {
  const body = { messages: QUESTION, max_completion_tokens: MAX_TOKENS, stream: true, ...COMMON };
  const deltas = [];
  for await (const chunk of await client.chat.completions.create(body)) {
    deltas.push(chunk.choices[0]?.delta?.content ?? "");
  }
  return { deltas };
}

async function tools() {
  const options = { tools: TOOLS, tool_choice: NAMED };
  const { message } = await create(WEATHER_QUESTION, options, JSON_TOKENS);
  const body = { messages: WEATHER_QUESTION, max_completion_tokens: JSON_TOKENS, ...options, ...COMMON };
  const streamed = await client.chat.completions.stream(body).finalMessage();
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: WEATHER.result };
  const answer = await create([...WEATHER_QUESTION, message, result], { tools: TOOLS, tool_choice: "none" });
  return { calls: calls(message), streamed: calls(streamed), answer: answer.message.content };
}

async function json_schema() {
  const json_schema = { name: PERSON.name, schema: PERSON.schema, strict: true };
  const body = { messages: [{ role: "user", content: PERSON.question }], max_completion_tokens: JSON_TOKENS, ...COMMON };
  const response_format = { type: "json_schema", json_schema };
  return JSON.parse((await client.chat.completions.parse({ response_format, ...body })).choices[0].message.content);
}

async function embeddings() {
  return (await client.embeddings.create({ model: MODEL, input: TEXTS })).data.map((item) => item.embedding);
}

async function logprobs() {
  const choice = await create(QUESTION, { logprobs: true, top_logprobs: 2 });
  return choice.logprobs.content.map((token) => token.logprob);
}

await report({ chat, stream, tools, json_schema, embeddings, logprobs });
