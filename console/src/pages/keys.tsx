import { call, key } from "../api";
import { count, moment } from "../format";
import { usePoll } from "../poll";
import { may, own, signOut } from "../session";
import type { ApiKey, Listed, May } from "../types";
import { Code, Empty, Failure, Loading, Notice, Page } from "../ui";

const MS = 10_000;
const SCOPES: { need: May; title: string; what: string }[] = [
  { need: "infer", title: "Requests", what: "chats, completions, embeddings, the list of models" },
  { need: "observe", title: "Observe", what: "statistics, metrics, traces, the OpenAPI document" },
  { need: "admin", title: "Adapters", what: "upload, replace, pin, roll back, delete, split" },
  { need: "operate", title: "Operate", what: "merge into the base model, see all keys" },
];

export function Keys() {
  return (
    <Page
      title="Keys"
      lead="Who may do what. Secrets are never shown: the server has digests only."
      tools={
        key.value && (
          <button type="button" onClick={signOut}>
            Sign out
          </button>
        )
      }
    >
      {own.value && !own.value.required && (
        <Notice kind="warn">
          <b>This server asks for no key</b>, and therefore listens on this machine only. <code>--keys-file</code> or <code>--api-key</code> changes that.
        </Notice>
      )}
      <Own />
      {may("operate") ? own.value?.required && <All /> : <Empty title="Other keys are not shown to this key.">That takes the scope admin, for all adapters.</Empty>}
      <section class="card">
        <h2>Change keys</h2>
        <p class="muted">Keys are changed by the operator on the server's machine; a running server notices within a second.</p>
        <Code label="Commands">{`loraplex keys new team-a --scope infer --adapter pirate --days 90 --keys-file keys.toml
loraplex keys ls --keys-file keys.toml
loraplex keys revoke team-a --keys-file keys.toml`}</Code>
      </section>
    </Page>
  );
}

function Own() {
  const { key } = own.value!;
  return (
    <section class="card">
      <h2>{key ? `Your key: ${key.name}` : "You, without a key"}</h2>
      <ul class="scopes">
        {SCOPES.map(({ need, title, what }) => (
          <li key={need} class={may(need) ? "yes" : "no"}>
            <span class="verdict">{may(need) ? "may" : "may not"}</span>
            <b>{title}</b>
            <span class="muted">{what}</span>
          </li>
        ))}
      </ul>
      {key?.adapters && <p class="muted">Only for {key.adapters.join(", ")}: to this key other adapters do not exist.</p>}
    </section>
  );
}

function All() {
  const keys = usePoll((signal) => call<Listed<ApiKey>>("/v1/keys", { signal }), MS);
  if (keys.data.value === null) return keys.error.value ? <Failure error={keys.error.value} /> : <Loading />;
  return (
    <section class="card">
      <h2>All keys</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="All keys">
        <table>
          <thead>
            <tr>
              {["name", "scopes", "tenant", "adapters", "limits", "expires"].map((head) => (
                <th scope="col" key={head}>
                  {head}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {keys.data.value.data.map((key) => (
              <tr key={key.name}>
                <th scope="row">{key.name}</th>
                <td>{key.scopes.join(", ")}</td>
                <td>{key.tenant || <span class="muted">none</span>}</td>
                <td>{key.adapters ? key.adapters.join(", ") : <span class="muted">all</span>}</td>
                <td>{limitsOf(key) || <span class="muted">none</span>}</td>
                <td>{key.expires === null ? <span class="muted">never</span> : key.expired ? <b class="bad">expired</b> : moment(key.expires)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function limitsOf({ limits, weight }: ApiKey): string {
  const parts = [
    limits.max_concurrent && `${count(limits.max_concurrent)} at once`,
    limits.requests_per_minute && `${count(limits.requests_per_minute)} requests/min`,
    limits.tokens_per_minute && `${count(limits.tokens_per_minute)} tokens/min`,
    weight !== 1 && `weight ${weight}`,
  ];
  return parts.filter(Boolean).join(", ");
}
