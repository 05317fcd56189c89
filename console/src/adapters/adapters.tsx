import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { call } from "../api";
import { DASH, ago, bytes, count, rate } from "../format";
import { usePoll } from "../poll";
import { go, link } from "../route";
import { may } from "../session";
import type { Adapter, Listed } from "../types";
import { Empty, Failure, Loading, Locked, Page, StateTag, TierTag } from "../ui";
import { chooseFiles, dropped, Upload, type Chosen } from "./upload";

const PAGE = 50;
const MS = 4000;
const TYPING_MS = 200;

export function Adapters() {
  return may("admin") ? (
    <Listing />
  ) : (
    <Page title="Adapters">
      <Locked need="admin" />
    </Page>
  );
}

function Listing() {
  const search = useSignal("");
  const wanted = useSignal("");
  const tier = useSignal("");
  const state = useSignal("");
  /** The name before each page so far: the list is paged by names, so that ten thousand adapters cost what fifty do. */
  const pages = useSignal<string[]>([""]);
  const files = useSignal<Chosen | null>(null);
  const over = useSignal(false);
  const timer = useRef(0);
  const after = pages.value.at(-1)!;
  const query = new URLSearchParams({ limit: String(PAGE), after });
  for (const [name, value] of [["search", wanted.value], ["tier", tier.value], ["state", state.value]] as const) if (value) query.set(name, value);
  const list = usePoll((signal) => call<Listed<Adapter>>(`/v1/adapters?${query}`, { signal }), MS, [String(query)]);
  useEffect(() => {
    pages.value = [""];
  }, [wanted.value, tier.value, state.value]);
  const type = (text: string) => {
    search.value = text;
    clearTimeout(timer.current);
    timer.current = window.setTimeout(() => (wanted.value = text.trim()), TYPING_MS);
  };
  const drop = async (event: DragEvent) => {
    event.preventDefault();
    over.value = false;
    files.value = await dropped(event.dataTransfer!);
  };
  const shown = list.data.value;
  return (
    <div
      class={`drop ${over.value ? "over" : ""}`}
      onDragOver={(event) => {
        event.preventDefault();
        over.value = true;
      }}
      onDragLeave={(event) => {
        if (!event.currentTarget.contains(event.relatedTarget as Node)) over.value = false;
      }}
      onDrop={drop}
    >
      <Page
        title="Adapters"
        lead="Drop a folder that PEFT saved anywhere on this page to publish it."
        tools={
          <button type="button" class="primary" onClick={async () => (files.value = await chooseFiles())}>
            Upload…
          </button>
        }
      >
        <div class="row filters">
          <input type="search" aria-label="Search adapters by name" placeholder="Search by name" value={search.value} onInput={(event) => type(event.currentTarget.value)} />
          <select aria-label="Tier" value={tier.value} onChange={(event) => (tier.value = event.currentTarget.value)}>
            <option value="">every tier</option>
            <option value="device">device</option>
            <option value="host">host</option>
            <option value="disk">disk</option>
          </select>
          <select aria-label="State" value={state.value} onChange={(event) => (state.value = event.currentTarget.value)}>
            <option value="">every state</option>
            <option value="ready">ready</option>
            <option value="loading">loading</option>
            <option value="registered">registered</option>
            <option value="failed">failed</option>
          </select>
        </div>
        <Failure error={shown ? null : list.error.value} />
        {shown === null ? <Loading rows={8} /> : <Table adapters={shown.data} searching={Boolean(wanted.value || tier.value || state.value)} />}
        {shown && (pages.value.length > 1 || shown.has_more) && (
          <div class="pager" role="group" aria-label="Pages">
            <button type="button" disabled={pages.value.length === 1} onClick={() => (pages.value = pages.value.slice(0, -1))}>
              Previous
            </button>
            <span class="muted">page {count(pages.value.length)}</span>
            <button type="button" disabled={!shown.has_more} onClick={() => (pages.value = [...pages.value, shown.data.at(-1)!.name])}>
              Next
            </button>
          </div>
        )}
      </Page>
      {files.value && (
        <Upload
          chosen={files.value}
          close={() => (files.value = null)}
          done={(name) => {
            files.value = null;
            go("adapters", name);
          }}
        />
      )}
    </div>
  );
}

function Table({ adapters, searching }: { adapters: Adapter[]; searching: boolean }) {
  if (!adapters.length && searching) return <Empty title="No adapter fits.">Search for less, or for every tier and state.</Empty>;
  if (!adapters.length) return <Empty title="No adapter yet.">Drop the folder with adapter_config.json and adapter_model.safetensors here.</Empty>;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Adapters">
      <table class="rows">
        <thead>
          <tr>
            <th scope="col">name</th>
            <th scope="col">state</th>
            <th scope="col">tier</th>
            <th scope="col" class="number">rank</th>
            <th scope="col" class="number">size</th>
            <th scope="col" class="number">in flight</th>
            <th scope="col" class="number">tokens/s</th>
            <th scope="col" class="number">requests</th>
            <th scope="col" class="number">last used</th>
          </tr>
        </thead>
        <tbody>
          {adapters.map((adapter) => (
            <tr key={adapter.name} onClick={() => go("adapters", adapter.name)}>
              <th scope="row">
                <a href={link("adapters", adapter.name)}>{adapter.name}</a>
                {adapter.pinned && <span class="tag">pinned</span>}
              </th>
              <td>
                <StateTag state={adapter.state} />
              </td>
              <td>
                <TierTag tier={adapter.tier} />
              </td>
              <td class="number">{adapter.rank ?? DASH}</td>
              <td class="number">{adapter.bytes ? bytes(adapter.bytes) : DASH}</td>
              <td class="number">{adapter.in_flight || <span class="muted">0</span>}</td>
              <td class="number">{adapter.traffic && adapter.traffic.tokens_per_second >= 0.05 ? rate(adapter.traffic.tokens_per_second) : <span class="muted">0</span>}</td>
              <td class="number">{adapter.traffic ? count(adapter.traffic.requests) : <span class="muted">0</span>}</td>
              <td class="number muted">{ago(adapter.last_used)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
