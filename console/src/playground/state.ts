// The conversation: what the user said, and the answer of each column to it. It outlives visits to other pages.
import { computed, signal, type Signal } from "@preact/signals";
import type { ApiError } from "../api";

export interface Alternative {
  token: string;
  logprob: number;
}

export interface ScoredToken extends Alternative {
  top: Alternative[];
}

export interface Call {
  name: string;
  arguments: string;
}

export interface Answer {
  text: string;
  reasoning: string;
  calls: Call[];
  tokens: ScoredToken[];
  /** Output tokens, counted by the server at the end. */
  count: number;
  started: number;
  first: number | null;
  ended: number | null;
  finish: string | null;
  fingerprint: string;
  error: ApiError | null;
}

export interface Column {
  id: number;
  model: Signal<string>;
  answers: Signal<Signal<Answer>[]>;
  stop: AbortController | null;
}

export const MOST_COLUMNS = 4;

let ids = 0;
export function column(model = ""): Column {
  return { id: ids++, model: signal(model), answers: signal([]), stop: null };
}

export const columns = signal<Column[]>([]);
export const said = signal<string[]>([]);
export const draft = signal("");
export const system = signal("");

export const sampling = {
  temperature: signal(0.7),
  top_p: signal(0.95),
  top_k: signal(0),
  repetition_penalty: signal(1),
  max_tokens: signal<number | null>(null),
  seed: signal<number | null>(null),
};
export const scored = signal(false);
export const tools = signal("");
export const format = signal<"text" | "json_object" | "json_schema">("text");
export const schema = signal("");

export const busy = computed(() => columns.value.some((one) => one.answers.value.some((answer) => answer.value.ended === null)));

export function emptied(): void {
  said.value = [];
  for (const one of columns.value) {
    one.stop?.abort();
    one.answers.value = [];
  }
}

export function fresh(): Answer {
  return { text: "", reasoning: "", calls: [], tokens: [], count: 0, started: performance.now(), first: null, ended: null, finish: null, fingerprint: "", error: null };
}
