// Streams the answers of all columns side by side.
import { signal, type Signal } from "@preact/signals";
import { ApiError, eventsOf, open } from "../api";
import { known } from "./context";
import { bodyOf } from "./request";
import { columns, draft, fresh, said, type Answer, type Call, type Column } from "./state";

interface Chunk {
  system_fingerprint: string;
  usage: { completion_tokens: number } | null;
  choices: {
    delta: { content?: string | null; reasoning_content?: string; tool_calls?: { index: number; function: { name?: string; arguments: string } }[] };
    logprobs: { content: { token: string; logprob: number; top_logprobs: { token: string; logprob: number }[] }[] } | null;
    finish_reason: string | null;
  }[];
}

export function ask(): void {
  const prompt = draft.value.trim();
  if (!prompt) return;
  draft.value = "";
  const turn = said.value.length;
  said.value = [...said.value, prompt];
  for (const column of columns.value) if (column.model.value) void answer(column, turn);
}

export function stop(): void {
  for (const column of columns.value) column.stop?.abort();
}

/** A column that joined later has empty answers to the earlier turns. */
function place(column: Column, turn: number): Signal<Answer> {
  const missing = Array.from({ length: turn - column.answers.value.length }, () => signal({ ...fresh(), ended: 0 }));
  const answer = signal(fresh());
  column.answers.value = [...column.answers.value, ...missing, answer];
  return answer;
}

async function answer(column: Column, turn: number): Promise<void> {
  const state = place(column, turn);
  const ended = new AbortController();
  column.stop = ended;
  const change = (changes: Partial<Answer>) => (state.value = { ...state.value, ...changes });
  try {
    await known();
    const body = { ...bodyOf(column), stream: true, stream_options: { include_usage: true } };
    const response = await open("/v1/chat/completions", { method: "POST", body, signal: ended.signal });
    for await (const chunk of eventsOf<Chunk>(response)) change(taken(state.value, chunk));
  } catch (error) {
    if (ended.signal.aborted) change({ finish: "stopped" });
    else change({ error: error instanceof ApiError ? error : new ApiError(0, "The connection broke before the answer was complete.") });
  }
  change({ ended: performance.now() });
}

function taken(answer: Answer, chunk: Chunk): Partial<Answer> {
  const changes: Partial<Answer> = { fingerprint: chunk.system_fingerprint };
  if (chunk.usage) changes.count = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return changes;
  const { delta, logprobs, finish_reason } = choice;
  if (answer.first === null && (delta.content || delta.reasoning_content || delta.tool_calls)) changes.first = performance.now();
  if (delta.content) changes.text = answer.text + delta.content;
  if (delta.reasoning_content) changes.reasoning = answer.reasoning + delta.reasoning_content;
  if (delta.tool_calls) changes.calls = called(answer.calls, delta.tool_calls);
  if (logprobs) changes.tokens = [...answer.tokens, ...logprobs.content.map(({ token, logprob, top_logprobs }) => ({ token, logprob, top: top_logprobs }))];
  if (finish_reason) changes.finish = finish_reason;
  return changes;
}

function called(calls: Call[], deltas: { index: number; function: { name?: string; arguments: string } }[]): Call[] {
  const result = calls.map((call) => ({ ...call }));
  for (const { index, function: part } of deltas) {
    const call = (result[index] ??= { name: "", arguments: "" });
    call.name = part.name ?? call.name;
    call.arguments += part.arguments;
  }
  return result;
}
