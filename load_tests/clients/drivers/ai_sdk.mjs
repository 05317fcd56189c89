// Vercel's AI SDK with its provider for OpenAI-compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateText, jsonSchema, streamText, tool } from "ai";

import { JSON_TOKENS, KEY, MAX_TOKENS, MODEL, PERSON, TASK, TEXTS, URL, WEATHER, report } from "./driver.mjs";

const provider = createOpenAICompatible({
  name: "loraplex",
  baseURL: `${URL}/v1`,
  apiKey: KEY,
  supportsStructuredOutputs: true,
});
const COMMON = { model: provider(MODEL), temperature: 0, maxRetries: 0 };
const TOOLS = {
  [WEATHER.name]: tool({
    description: WEATHER.description,
    inputSchema: jsonSchema(WEATHER.parameters),
    execute: async () => WEATHER.result,
  }),
};
const calls = (made) => made.map((each) => ({ name: each.toolName, arguments: each.input }));

async function chat() {
  return (await generateText({ prompt: TASK.question, maxOutputTokens: MAX_TOKENS, ...COMMON })).text;
}

async function stream() {
  const deltas = [];
  const { textStream } = streamText({ prompt: TASK.question, maxOutputTokens: MAX_TOKENS, ...COMMON });
  for await (const delta of textStream) deltas.push(delta);
  return { deltas };
}

async function tools() {
  const question = { role: "user", content: WEATHER.question };
  const toolChoice = { type: "tool", toolName: WEATHER.name };
  const options = { messages: [question], tools: TOOLS, toolChoice, maxOutputTokens: JSON_TOKENS, ...COMMON };
  const made = await generateText(options);
  const streamed = await streamText(options).toolCalls;
  const messages = [question, ...made.response.messages]; // the call and the result of `execute`
  const answer = await generateText({ ...options, messages, toolChoice: "none", maxOutputTokens: MAX_TOKENS });
  return { calls: calls(made.toolCalls), streamed: calls(streamed), answer: answer.text };
}

async function json_schema() {
  const output = Output.object({ schema: jsonSchema(PERSON.schema) });
  return (await generateText({ prompt: PERSON.question, output, maxOutputTokens: JSON_TOKENS, ...COMMON })).output;
}

async function embeddings() {
  return (await embedMany({ model: provider.embeddingModel(MODEL), values: TEXTS, maxRetries: 0 })).embeddings;
}

// The SDK has no log-probabilities of its own: it passes the provider's options on and keeps the response's body.
async function logprobs() {
  const providerOptions = { loraplex: { logprobs: true, top_logprobs: 2 } };
  const include = { responseBody: true };
  const options = { prompt: TASK.question, providerOptions, include, maxOutputTokens: MAX_TOKENS, ...COMMON };
  const { response } = await generateText(options);
  return response.body.choices[0].logprobs.content.map((token) => token.logprob);
}

await report({ chat, stream, tools, json_schema, embeddings, logprobs });
