// The parts that all pages are made of.
import { useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";
import type { ApiError, Problem } from "./api";
import { own } from "./session";
import type { May, State, Tier } from "./types";

export function Page({ title, lead, tools, children }: { title: string; lead?: ComponentChildren; tools?: ComponentChildren; children: ComponentChildren }) {
  useEffect(() => {
    document.title = `${title} · Loraplex`;
  }, [title]);
  return (
    <article class="page">
      <header class="page-head">
        <div>
          <h1>{title}</h1>
          {lead && <p class="lead">{lead}</p>}
        </div>
        {tools && <div class="tools">{tools}</div>}
      </header>
      {children}
    </article>
  );
}

export function Notice({ kind, children }: { kind: "bad" | "warn" | "good" | "calm"; children: ComponentChildren }) {
  return (
    <div class={`notice ${kind}`} role={kind === "bad" ? "alert" : "status"}>
      {children}
    </div>
  );
}

export function Failure({ error }: { error: ApiError | null }) {
  if (error === null) return null;
  return (
    <Notice kind="bad">
      <strong>{error.problems.length > 1 ? `Refused as a whole, for ${error.problems.length} reasons:` : error.message}</strong>
      {error.problems.length > 0 && <Problems list={error.problems} />}
    </Notice>
  );
}

/** Every reason for which an adapter was refused. */
export function Problems({ list }: { list: Problem[] }) {
  return (
    <ul class="problems" tabIndex={0} aria-label="Reasons">
      {list.map((problem) => (
        <li key={problem.where + problem.code + problem.found}>
          <code class="where">{problem.where}</code>
          <span class="tag">{problem.code}</span>
          <div>
            found <b>{problem.found}</b>, expected <b>{problem.expected}</b>
          </div>
        </li>
      ))}
    </ul>
  );
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <p class="empty-title">{title}</p>
      {children && <div class="muted">{children}</div>}
    </div>
  );
}

export function Loading({ rows = 4 }: { rows?: number }) {
  return (
    <div class="loading" role="status" aria-label="Loading">
      {Array.from({ length: rows }, (_, i) => (
        <span key={i} class="bone" />
      ))}
    </div>
  );
}

const NEEDS: Record<May, string> = {
  infer: "send requests to models",
  observe: "see metrics and statistics",
  admin: "see and change adapters",
  operate: "merge adapters or see other keys",
};

/** What a page shows to a key that lacks the scope. */
export function Locked({ need }: { need: May }) {
  const key = own.value?.key;
  const scope = need === "operate" ? "admin" : need;
  return (
    <div class="empty locked">
      <p class="empty-title">This key may not {NEEDS[need]}.</p>
      <p class="muted">
        The key <b>{key?.name}</b> has {key?.scopes.length ? <>the scope {key.scopes.join(" and ")}</> : "no scope"}
        {key?.adapters ? <> for the adapters {key.adapters.join(", ")}</> : null}. This page needs <b>{scope}</b>
        {need === "operate" ? " for all adapters" : ""}; the operator makes such a key with
      </p>
      <Code label="Command">loraplex keys new NAME --scope {scope} --keys-file keys.toml</Code>
    </div>
  );
}

export function TierTag({ tier }: { tier: Tier }) {
  return (
    <span class={`tier ${tier}`}>
      <i aria-hidden="true" />
      {tier}
    </span>
  );
}

export function StateTag({ state }: { state: State }) {
  return <span class={`state ${state}`}>{state}</span>;
}

export function Meter({ value, label, pinned = 0 }: { value: number; label: string; pinned?: number }) {
  const part = Math.min(Math.max(value, 0), 1);
  return (
    <div class="meter" role="meter" aria-label={label} aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round(part * 100)}>
      <span style={{ width: `${part * 100}%` }} />
      {pinned > 0 && <span class="pinned" style={{ width: `${pinned * 100}%` }} />}
    </div>
  );
}

export function Switch({ on, label, change, disabled }: { on: boolean; label: string; change: (on: boolean) => void; disabled?: boolean }) {
  return (
    <label class="switch">
      <input type="checkbox" role="switch" checked={on} disabled={disabled} onChange={(event) => change(event.currentTarget.checked)} />
      <span>{label}</span>
    </label>
  );
}

export function Field({ label, hint, children }: { label: string; hint?: ComponentChildren; children: (id: string) => ComponentChildren }) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      {children(id)}
      {hint && <p class="hint">{hint}</p>}
    </div>
  );
}

/** Code that the keyboard can scroll. */
export function Code({ label, children, json = false }: { label: string; children: ComponentChildren; json?: boolean }) {
  return (
    <pre class={`code ${json ? "json" : ""}`} tabIndex={0} role="group" aria-label={label}>
      {children}
    </pre>
  );
}

export function Copy({ text, children, primary = false }: { text: () => string; children: ComponentChildren; primary?: boolean }) {
  const done = useSignal(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text());
    done.value = true;
    setTimeout(() => (done.value = false), 1500);
  };
  return (
    <button type="button" class={primary ? "primary" : "quiet"} onClick={copy}>
      {done.value ? "Copied" : children}
    </button>
  );
}

/** A dialog that the Escape key and a click beside it close. */
export function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null);
  const id = useId();
  useEffect(() => box.current!.showModal(), []);
  const beside = (event: MouseEvent) => {
    if (event.target === box.current) close();
  };
  return (
    <dialog ref={box} aria-labelledby={id} onClose={close} onClick={beside}>
      <div class="dialog-body">
        <h2 id={id}>{title}</h2>
        {children}
      </div>
    </dialog>
  );
}

/** The base model as a slab, with adapters on it. */
export function Mark({ size }: { size: number }) {
  return (
    <svg class="mark" viewBox="0 0 32 32" width={size} height={size} aria-hidden="true">
      <rect class="slab" x="3" y="24" width="26" height="5" rx="1.5" />
      <rect x="3" y="4" width="14" height="4" rx="1.5" />
      <rect x="9" y="11" width="20" height="4" rx="1.5" />
      <rect x="3" y="18" width="18" height="3" rx="1.5" />
    </svg>
  );
}
