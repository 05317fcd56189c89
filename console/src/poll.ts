// Data that is asked for again and again while its page is visible.
import { useSignal, type Signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { ApiError } from "./api";

export interface Polled<T> {
  data: Signal<T | null>;
  error: Signal<ApiError | null>;
  refresh: () => void;
}

/** Calls `load` now and every `interval` ms; what was loaded stays while the server does not answer. */
export function usePoll<T>(load: (signal: AbortSignal) => Promise<T>, interval: number, inputs: unknown[] = []): Polled<T> {
  const data = useSignal<T | null>(null);
  const error = useSignal<ApiError | null>(null);
  const asked = useSignal(0);
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    const ask = async () => {
      clearTimeout(timer);
      if (document.hidden) return;
      try {
        data.value = await load(stop.signal);
        error.value = null;
      } catch (problem) {
        if (stop.signal.aborted) return;
        error.value = problem instanceof ApiError ? problem : new ApiError(0, String(problem));
      }
      if (!stop.signal.aborted) timer = window.setTimeout(ask, interval);
    };
    document.addEventListener("visibilitychange", ask);
    void ask();
    return () => {
      stop.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", ask);
    };
  }, [...inputs, interval, asked.value]);
  return { data, error, refresh: () => asked.value++ };
}
