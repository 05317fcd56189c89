// The request of a column, which is sent and also shown as code.
import { usualTokens } from "./context";
import { format, said, sampling, schema, scored, system, tools, type Column } from "./state";

export type Body = Record<string, unknown>;

/** Why the settings make no request, or an empty text. */
export function wrong(): string {
  if (!parses(tools.value)) return "The functions are not valid JSON.";
  if (format.value === "json_schema" && (!schema.value.trim() || !parses(schema.value))) return "The JSON schema is missing or not valid JSON.";
  return "";
}

function parses(text: string): boolean {
  try {
    if (text.trim()) JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

export function bodyOf(column: Column): Body {
  return { model: column.model.value, messages: messagesOf(column), ...settings() };
}

function messagesOf(column: Column): Body[] {
  const messages: Body[] = system.value.trim() ? [{ role: "system", content: system.value }] : [];
  said.value.forEach((content, turn) => {
    messages.push({ role: "user", content });
    const answer = column.answers.value[turn]?.value;
    if (turn < said.value.length - 1 && answer?.text) messages.push({ role: "assistant", content: answer.text });
  });
  return messages;
}

function settings(): Body {
  const { temperature, top_p, top_k, repetition_penalty, max_tokens, seed } = sampling;
  const body: Body = { max_tokens: max_tokens.value ?? usualTokens.value, temperature: temperature.value };
  if (temperature.value > 0) {
    if (top_p.value < 1) body.top_p = top_p.value;
    if (top_k.value > 0) body.top_k = top_k.value;
    if (seed.value !== null) body.seed = seed.value;
  }
  if (repetition_penalty.value !== 1) body.repetition_penalty = repetition_penalty.value;
  if (scored.value) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (tools.value.trim()) body.tools = JSON.parse(tools.value);
  if (format.value === "json_object") body.response_format = { type: "json_object" };
  if (format.value === "json_schema") body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema.value) } };
  return body;
}
