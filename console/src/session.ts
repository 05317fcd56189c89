// Who uses the console: the key, what it may do, and the server that it speaks to.
import { computed, effect, signal } from "@preact/signals";
import { ApiError, call, key, reachable, refusals, keepKey } from "./api";
import type { May, OwnKey, Version } from "./types";

/** Null until the server has said what the key may do. */
export const own = signal<OwnKey | null>(null);
export const version = signal<Version | null>(null);
export const mustSignIn = signal(false);
/** Why the last key was refused. */
export const refusal = signal("");

export const base = computed(() => version.value?.base_model ?? "");

export function may(need: May): boolean {
  return own.value?.may.includes(need) ?? false;
}

const RETRY_MS = 2000;

async function look(): Promise<void> {
  try {
    version.value = await call<Version>("/version");
    own.value = await call<OwnKey>("/v1/keys/self");
    mustSignIn.value = false;
    refusal.value = "";
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      refusal.value = key.value ? error.message : "";
      keepKey("");
      mustSignIn.value = true;
    } else {
      setTimeout(look, RETRY_MS);
    }
  }
}

export async function signIn(secret: string): Promise<void> {
  keepKey(secret);
  await look();
}

export function signOut(): void {
  keepKey("");
  own.value = null;
  refusal.value = "";
  void look();
}

export function start(): void {
  void look();
  let known = refusals.value;
  effect(() => {
    if (refusals.value === known) return;
    known = refusals.value;
    if (own.value) void look(); // the key has expired or was revoked
  });
  let before = true;
  effect(() => {
    if (reachable.value && !before) void look(); // another model or other keys may be there after a restart
    before = reachable.value;
  });
}
