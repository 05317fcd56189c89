import { useSignal } from "@preact/signals";
import { ApiError, adapterPath, call } from "../api";
import { ago } from "../format";
import { ModelPicker } from "../picker";
import { usePoll } from "../poll";
import { link } from "../route";
import { base, may } from "../session";
import type { Alias, Listed } from "../types";
import { Empty, Failure, Field, Loading, Locked, Page } from "../ui";

const MS = 5000;
const STEP = 1;

export function Splits() {
  return (
    <Page title="Splits" lead="One name for several adapters, by weight: a canary gets a share of the requests. A client's user stays on one side.">
      {may("admin") ? <All /> : <Locked need="admin" />}
    </Page>
  );
}

function All() {
  const aliases = usePoll((signal) => call<Listed<Alias>>("/v1/aliases", { signal }), MS);
  const known = aliases.data.value?.data;
  if (!known) return aliases.error.value ? <Failure error={aliases.error.value} /> : <Loading />;
  return (
    <>
      {known.length === 0 && <Empty title="No split yet.">Give two adapters one name below, and move requests from one to the other.</Empty>}
      {known.map((alias) => (
        <Split key={alias.name} alias={alias} refresh={aliases.refresh} />
      ))}
      <Create refresh={aliases.refresh} />
    </>
  );
}

/** The weights as shares of 100. */
function shares(weights: Record<string, number>): [string, number][] {
  const sum = Object.values(weights).reduce((a, b) => a + b, 0);
  return Object.entries(weights).map(([name, weight]) => [name, (100 * weight) / sum]);
}

function Split({ alias, refresh }: { alias: Alias; refresh: () => void }) {
  const edited = useSignal<Record<string, number> | null>(null);
  const failure = useSignal<ApiError | null>(null);
  const removing = useSignal(false);
  const weights = edited.value ?? alias.weights;
  const members = shares(weights);
  const run = async (request: Parameters<typeof call>[1]) => {
    failure.value = null;
    try {
      await call(adapterPath(alias.name, "split"), request);
      edited.value = null;
    } catch (error) {
      failure.value = error as ApiError;
    }
    refresh();
  };
  /** What one member gains, the others lose in proportion. */
  const move = (name: string, share: number) => {
    const others = members.filter(([other]) => other !== name);
    const rest = others.reduce((sum, [, value]) => sum + value, 0);
    const scale = (value: number) => (rest ? (value / rest) * (100 - share) : (100 - share) / others.length);
    edited.value = Object.fromEntries(members.map(([other, value]) => [other, other === name ? share : Math.round(scale(value) * 10) / 10]));
  };
  return (
    <section class="card split" aria-label={`Split ${alias.name}`}>
      <div class="labelled">
        <h2>{alias.name}</h2>
        <span class="muted">since {ago(alias.created)}</span>
      </div>
      <div class="stack" aria-hidden="true">
        {members.map(([name, share], number) => (
          <span key={name} class={`part p${number % 4}`} style={{ width: `${share}%` }} />
        ))}
      </div>
      {members.map(([name, share], number) => (
        <div class="slider" key={name}>
          <i class={`part p${number % 4}`} aria-hidden="true" />
          {name === base.value ? <span>{name}</span> : <a href={link("adapters", name)}>{name}</a>}
          <input type="range" min={0} max={100} step={STEP} value={share} disabled={members.length === 1} aria-label={`Share of ${name}`} onInput={(event) => move(name, event.currentTarget.valueAsNumber)} />
          <output>{share.toFixed(share % 1 ? 1 : 0)} %</output>
        </div>
      ))}
      <Failure error={failure.value} />
      <div class="actions">
        {removing.value ? (
          <>
            <span class="muted">Its members stay. </span>
            <button type="button" class="quiet" onClick={() => (removing.value = false)}>
              Keep it
            </button>
            <button type="button" class="danger" onClick={() => run({ method: "DELETE" })}>
              Remove the split
            </button>
          </>
        ) : (
          <button type="button" class="quiet" onClick={() => (removing.value = true)}>
            Remove…
          </button>
        )}
        <button type="button" disabled={!edited.value} onClick={() => (edited.value = null)}>
          Reset
        </button>
        <button type="button" class="primary" disabled={!edited.value} onClick={() => run({ method: "PUT", body: { weights } })}>
          Apply
        </button>
      </div>
    </section>
  );
}

function Create({ refresh }: { refresh: () => void }) {
  const name = useSignal("");
  const first = useSignal("");
  const second = useSignal("");
  const share = useSignal(10);
  const failure = useSignal<ApiError | null>(null);
  const create = async (event: Event) => {
    event.preventDefault();
    failure.value = null;
    try {
      const weights = { [first.value]: 100 - share.value, [second.value]: share.value };
      await call(adapterPath(name.value.trim(), "split"), { method: "PUT", body: { weights } });
      name.value = first.value = second.value = "";
    } catch (error) {
      failure.value = error as ApiError;
    }
    refresh();
  };
  return (
    <form class="card" onSubmit={create}>
      <h2>New split</h2>
      <div class="grid">
        <Field label="Name" hint="What clients ask for.">
          {(id) => <input id={id} spellcheck={false} value={name.value} onInput={(event) => (name.value = event.currentTarget.value)} />}
        </Field>
        <ModelPicker label="Stable" value={first.value} choose={(chosen) => (first.value = chosen)} />
        <ModelPicker label="Canary" value={second.value} choose={(chosen) => (second.value = chosen)} />
        <Field label={`Share of the canary: ${share.value} %`}>
          {(id) => <input id={id} type="range" min={0} max={100} step={STEP} value={share.value} onInput={(event) => (share.value = event.currentTarget.valueAsNumber)} />}
        </Field>
      </div>
      <Failure error={failure.value} />
      <div class="actions">
        <button type="submit" class="primary" disabled={!name.value.trim() || !first.value || !second.value || first.value === second.value}>
          Create
        </button>
      </div>
    </form>
  );
}
