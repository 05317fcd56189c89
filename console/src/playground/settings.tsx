import type { Signal } from "@preact/signals";
import { Field, Switch } from "../ui";
import { usualTokens } from "./context";
import { format, sampling, schema, scored, system, tools } from "./state";

const EXAMPLE = JSON.stringify(
  [{ type: "function", function: { name: "get_weather", description: "The weather of a city", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }],
  null,
  2,
);
const SCHEMA = JSON.stringify({ type: "object", properties: { answer: { type: "string" } }, required: ["answer"] }, null, 2);

export function Settings() {
  const { temperature, top_p, top_k, repetition_penalty, max_tokens, seed } = sampling;
  return (
    <aside class="settings" id="settings" aria-label="Settings">
      <Field label="System prompt">
        {(id) => <textarea id={id} rows={3} value={system.value} placeholder="none" onInput={(event) => (system.value = event.currentTarget.value)} />}
      </Field>
      <Slide label="Temperature" value={temperature} max={2} step={0.05} hint={temperature.value === 0 ? "greedy: always the most probable token" : undefined} />
      <Slide label="Top p" value={top_p} max={1} step={0.01} least={0.01} idle={temperature.value === 0} />
      <Slide label="Repetition penalty" value={repetition_penalty} max={2} step={0.05} least={1} />
      <div class="pair">
        <Field label="Top k">
          {(id) => <input id={id} type="number" min={0} value={top_k.value} onInput={(event) => (top_k.value = event.currentTarget.valueAsNumber || 0)} />}
        </Field>
        <Optional label="Most tokens" value={max_tokens} least={1} usual={String(usualTokens.value)} />
      </div>
      <Optional label="Seed" value={seed} least={0} usual="random" />
      <Switch on={scored.value} label="Show probabilities of tokens" change={(on) => (scored.value = on)} />
      <Field label="Output">
        {(id) => (
          <select
            id={id}
            value={format.value}
            onChange={(event) => {
              format.value = event.currentTarget.value as typeof format.value;
              if (format.value === "json_schema" && !schema.value) schema.value = SCHEMA;
            }}
          >
            <option value="text">free text</option>
            <option value="json_object">a JSON object</option>
            <option value="json_schema">JSON of a schema</option>
          </select>
        )}
      </Field>
      {format.value === "json_schema" && (
        <Field label="Schema">{(id) => <textarea id={id} class="mono" rows={7} spellcheck={false} value={schema.value} onInput={(event) => (schema.value = event.currentTarget.value)} />}</Field>
      )}
      <Field
        label="Functions"
        hint={
          <button type="button" class="quiet" onClick={() => (tools.value = tools.value ? "" : EXAMPLE)}>
            {tools.value ? "Remove them" : "Insert an example"}
          </button>
        }
      >
        {(id) => <textarea id={id} class="mono" rows={tools.value ? 8 : 2} spellcheck={false} placeholder="none" value={tools.value} onInput={(event) => (tools.value = event.currentTarget.value)} />}
      </Field>
    </aside>
  );
}

function Slide({ label, value, max, step, least = 0, idle = false, hint }: { label: string; value: Signal<number>; max: number; step: number; least?: number; idle?: boolean; hint?: string }) {
  return (
    <Field
      label={
        // The number is a part of the label, so that it is read with it.
        `${label}: ${value.value}`
      }
      hint={hint}
    >
      {(id) => <input id={id} type="range" min={least} max={max} step={step} disabled={idle} value={value.value} onInput={(event) => (value.value = event.currentTarget.valueAsNumber)} />}
    </Field>
  );
}

/** A number that may be left empty, for the usual one. */
function Optional({ label, value, least, usual }: { label: string; value: Signal<number | null>; least: number; usual: string }) {
  const type = (text: string) => (value.value = text === "" ? null : Math.max(Number(text), least));
  return <Field label={label}>{(id) => <input id={id} type="number" min={least} placeholder={usual} value={value.value ?? ""} onInput={(event) => type(event.currentTarget.value)} />}</Field>;
}
