import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { ApiError, adapterPath, call } from "../api";
import { count } from "../format";
import { may } from "../session";
import type { Stats } from "../types";
import { Dialog, Failure, Field, Notice } from "../ui";

const WATCH_MS = 500;

interface Deleted {
  drained: number;
  aborted: number;
}

/** Deletes an adapter and shows how its running requests drain. */
export function Delete({ name, inFlight, close, done }: { name: string; inFlight: number; close: () => void; done: () => void }) {
  const timeout = useSignal(30);
  const draining = useSignal(false);
  const left = useSignal(inFlight);
  const failure = useSignal<ApiError | null>(null);
  const deleted = useSignal<Deleted | null>(null);
  useEffect(() => {
    if (!draining.value || !may("observe")) return;
    const timer = setInterval(async () => {
      const stats = await call<Stats>(`/v1/stats?adapter=${encodeURIComponent(name)}`).catch(() => null);
      if (stats) left.value = stats.adapters[0]?.in_flight ?? 0;
    }, WATCH_MS);
    return () => clearInterval(timer);
  }, [draining.value]);
  const remove = async (event: Event) => {
    event.preventDefault();
    failure.value = null;
    draining.value = true;
    try {
      deleted.value = await call<Deleted>(`${adapterPath(name)}?drain_timeout=${timeout.value}`, { method: "DELETE" });
    } catch (error) {
      failure.value = error as ApiError;
    }
    draining.value = false;
  };
  if (deleted.value) {
    const { drained, aborted } = deleted.value;
    return (
      <Dialog title={`${name} is deleted`} close={done}>
        <p>
          {count(drained)} running requests finished, {count(aborted)} were aborted. Its memory is free again.
        </p>
        <div class="actions">
          <button type="button" class="primary" autofocus onClick={done}>
            Close
          </button>
        </div>
      </Dialog>
    );
  }
  return (
    <Dialog title={`Delete ${name}?`} close={close}>
      <form onSubmit={remove}>
        <p>New requests get 404 at once. Running ones may finish; all versions are removed from this server.</p>
        <Field label="Seconds to wait for running requests" hint="Those that take longer are aborted.">
          {(id) => <input id={id} type="number" min={0} max={3600} value={timeout.value} disabled={draining.value} onInput={(event) => (timeout.value = event.currentTarget.valueAsNumber || 0)} />}
        </Field>
        {draining.value && (
          <Notice kind="warn">
            <b>Draining.</b> {left.value ? `${count(left.value)} requests still run.` : "Nothing runs any more; freeing its memory."}
          </Notice>
        )}
        <Failure error={failure.value} />
        <div class="actions">
          <button type="button" class="quiet" autofocus onClick={close}>
            Keep it
          </button>
          <button type="submit" class="danger" disabled={draining.value}>
            {draining.value ? "Deleting…" : "Delete"}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
