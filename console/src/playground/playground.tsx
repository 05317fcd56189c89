import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { call } from "../api";
import { base, may } from "../session";
import type { Adapter, Listed } from "../types";
import { Locked, Notice, Page } from "../ui";
import { AnswerColumn } from "./column";
import { known } from "./context";
import { wrong } from "./request";
import { ask, stop } from "./send";
import { Settings } from "./settings";
import { MOST_COLUMNS, busy, column, columns, draft, emptied, said } from "./state";

const OFFERED = ["What is the capital of France?", "How do I boil an egg?", "Table dogs(breed, dog, age). Which dogs are younger than 5?"];

export function Playground({ first }: { first: string }) {
  if (!may("infer")) {
    return (
      <Page title="Playground">
        <Locked need="infer" />
      </Page>
    );
  }
  return <Playing first={first} />;
}

/** The base model beside the adapter of the address, or beside two adapters, so that a new user sees a difference. */
async function choose(first: string): Promise<void> {
  if (first) {
    const models = columns.value.map((one) => one.model.value);
    if (!models.includes(first)) columns.value = [column(base.value), column(first)];
    return;
  }
  if (columns.value.length) return;
  const listed = may("admin") ? await call<Listed<Adapter>>("/v1/adapters?limit=2&state=ready").catch(() => null) : null;
  const names = listed?.data.map((adapter) => adapter.name) ?? [];
  if (!columns.value.length) columns.value = [base.value, ...names].map(column);
}

function Playing({ first }: { first: string }) {
  const settings = useSignal(matchMedia("(min-width: 1100px)").matches);
  useEffect(() => void choose(first), [first]);
  useEffect(() => void known(), [base.value]);
  return (
    <Page
      title="Playground"
      lead="One prompt, several models, side by side in the same passes."
      tools={
        <>
          {said.value.length > 0 && (
            <button type="button" class="quiet" onClick={emptied}>
              Clear
            </button>
          )}
          <button type="button" disabled={columns.value.length >= MOST_COLUMNS} onClick={() => (columns.value = [...columns.value, column()])}>
            Add a model
          </button>
          <button type="button" aria-expanded={settings.value} aria-controls="settings" onClick={() => (settings.value = !settings.value)}>
            Settings
          </button>
        </>
      }
    >
      <div class={`play ${settings.value ? "with-settings" : ""}`}>
        <div class="columns" style={{ "--columns": Math.max(columns.value.length, 1) }}>
          {columns.value.map((one) => (
            <AnswerColumn key={one.id} column={one} alone={columns.value.length === 1} remove={() => (columns.value = columns.value.filter((other) => other !== one))} />
          ))}
        </div>
        {settings.value && <Settings />}
      </div>
      <Composer />
    </Page>
  );
}

function Composer() {
  const box = useRef<HTMLTextAreaElement>(null);
  const problem = wrong();
  const ready = draft.value.trim() !== "" && !busy.value && !problem && columns.value.some((one) => one.model.value);
  const submit = (event: Event) => {
    event.preventDefault();
    if (ready) ask();
  };
  return (
    <form class="composer" onSubmit={submit}>
      {said.value.length === 0 && !draft.value && (
        <div class="offers" aria-label="Examples" role="group">
          {OFFERED.map((text) => (
            <button
              key={text}
              type="button"
              class="quiet"
              onClick={() => {
                draft.value = text;
                box.current?.focus();
              }}
            >
              {text}
            </button>
          ))}
        </div>
      )}
      {problem && <Notice kind="warn">{problem}</Notice>}
      <div class="prompt">
        <textarea
          ref={box}
          aria-label="Prompt"
          placeholder="Ask all of them something"
          rows={Math.min(Math.max(draft.value.split("\n").length, 1), 8)}
          value={draft.value}
          onInput={(event) => (draft.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
          }}
        />
        {busy.value ? (
          <button type="button" onClick={stop}>
            Stop
          </button>
        ) : (
          <button type="submit" class="primary" disabled={!ready}>
            Send
          </button>
        )}
      </div>
    </form>
  );
}
