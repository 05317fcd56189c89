// The context length of the base model, on which the usual length of an answer depends.
import { computed, signal } from "@preact/signals";
import { call } from "../api";
import { base } from "../session";

const USUAL = 256;

const length = signal<number | null>(null);
let asked: { model: string; answer: Promise<void> } | null = null;

/** Output tokens unless the user says otherwise: a short answer, which leaves room for a conversation. */
export const usualTokens = computed(() => Math.min(USUAL, Math.floor((length.value ?? Infinity) / 4)));

/** Resolves when `usualTokens` is right, or cannot be known. */
export function known(): Promise<void> {
  if (asked?.model !== base.value) asked = { model: base.value, answer: look(base.value) };
  return asked.answer;
}

async function look(model: string): Promise<void> {
  try {
    length.value = (await call<{ max_model_len: number | null }>(`/v1/models/${encodeURIComponent(model)}`)).max_model_len;
  } catch {
    length.value = null;
  }
  if (length.value === null) asked = null; // the model may be loading
}
