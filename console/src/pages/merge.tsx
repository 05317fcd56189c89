import { useSignal } from "@preact/signals";
import { ApiError, call } from "../api";
import { short } from "../format";
import { ModelPicker } from "../picker";
import { usePoll } from "../poll";
import { link } from "../route";
import { base, may } from "../session";
import type { MergeStatus } from "../types";
import { Failure, Loading, Locked, Notice, Page, Switch } from "../ui";

const MS = 2000;
const STATES: Record<MergeStatus["state"], string> = {
  none: "No adapter is merged",
  preparing: "Computing the merged weights",
  waiting: "Waiting for requests of other models",
  merged: "Merged",
  leaving: "Restoring the base model",
};

export function Merge() {
  return (
    <Page title="Merge" lead="Fold one adapter into the base model: its requests then cost what those of the base model cost.">
      {may("operate") ? <Merging /> : <Locked need="operate" />}
    </Page>
  );
}

function Merging() {
  const status = usePoll((signal) => call<MergeStatus>("/v1/merge", { signal }), MS);
  const failure = useSignal<ApiError | null>(null);
  const busy = useSignal(false);
  const run = async (request: Parameters<typeof call>[1]) => {
    busy.value = true;
    failure.value = null;
    status.refresh();
    try {
      await call("/v1/merge", request);
    } catch (error) {
      failure.value = error as ApiError;
    }
    busy.value = false;
    status.refresh();
  };
  const now = status.data.value;
  if (now === null) return status.error.value ? <Failure error={status.error.value} /> : <Loading />;
  return (
    <>
      <Failure error={failure.value} />
      <section class={`card merge-state ${now.state}`} aria-live="polite">
        <p class="eyebrow">{STATES[now.state]}</p>
        <p class="merge-sum">
          <span>{base.value}</span>
          {now.adapter && (
            <>
              <span class="plus">+</span>
              <a href={link("adapters", now.adapter)}>{now.adapter}</a>
              <code class="muted">{short(now.version)}</code>
            </>
          )}
        </p>
        {now.requantized && <Notice kind="warn">The merged weights were rounded to 4 bits again.</Notice>}
        <p class="muted">
          {now.asked_by === "policy" ? "The server's policy merged it. " : ""}
          While an adapter is merged, requests of other models {now.others === "wait" ? "have it unmerged first, and wait" : "are refused"}. {now.policy === "auto" ? "The server also merges by itself." : "The server merges nothing by itself."}
        </p>
        {now.state !== "none" && (
          <button type="button" disabled={now.state === "leaving"} onClick={() => run({ method: "DELETE" })}>
            Restore the base model
          </button>
        )}
      </section>
      {now.state === "none" && <Choose busy={busy.value} merge={(name, drain) => run({ method: "POST", body: { name, drain } })} />}
    </>
  );
}

function Choose({ busy, merge }: { busy: boolean; merge: (name: string, drain: boolean) => void }) {
  const name = useSignal("");
  const drain = useSignal(true);
  return (
    <section class="card">
      <h2>Merge an adapter</h2>
      <div class="row ends">
        <ModelPicker label="Adapter" value={name.value} choose={(chosen) => (name.value = chosen)} only="adapters" />
        <Switch on={drain.value} label="wait for requests of other models" change={(on) => (drain.value = on)} />
        <button type="button" class="primary" disabled={!name.value || busy} onClick={() => merge(name.value, drain.value)}>
          {busy ? "Merging…" : "Merge"}
        </button>
      </div>
      <p class="hint">The base model is restored bit for bit when the adapter is unmerged.</p>
    </section>
  );
}
