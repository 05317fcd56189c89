import { useSignal, type Signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { ApiError, adapterPath, call } from "../api";
import { DASH, ago, bytes, count, moment, rate, short } from "../format";
import { usePoll } from "../poll";
import { link } from "../route";
import { may } from "../session";
import type { Adapter, AdapterVersion, Alias, Listed } from "../types";
import { Copy, Empty, Failure, Loading, Locked, Notice, Page, StateTag, Switch, TierTag } from "../ui";
import { Delete } from "./delete";
import { Facts, flat } from "./report";
import { chooseFiles, dropped, Upload, type Chosen } from "./upload";
import { Versions } from "./versions";

const MS = 2000;

export function Detail({ name }: { name: string }) {
  return may("admin") ? (
    <Found name={name} />
  ) : (
    <Page title={name}>
      <Locked need="admin" />
    </Page>
  );
}

function Found({ name }: { name: string }) {
  const deleted = useSignal(false);
  const record = usePoll((signal) => call<Adapter | Alias>(adapterPath(name), { signal }), MS);
  const versions = usePoll((signal) => call<Listed<AdapterVersion>>(adapterPath(name, "versions"), { signal }), MS * 2, [
    record.data.value?.kind === "adapter" && record.data.value.version,
  ]);
  const now = record.data.value;
  const refresh = () => {
    record.refresh();
    versions.refresh();
  };
  if (deleted.value || (record.error.value?.status === 404 && !now)) return <Gone name={name} deleted={deleted.value} />;
  if (now === null) {
    return (
      <Page title={name}>
        <Failure error={record.error.value} />
        <Loading rows={6} />
      </Page>
    );
  }
  if (now.kind === "alias") {
    return (
      <Page title={name}>
        <Empty title="This name is an alias.">
          Its weights are on the page <a href={link("splits")}>Splits</a>.
        </Empty>
      </Page>
    );
  }
  return <Record adapter={now} versions={versions.data.value?.data ?? null} refresh={refresh} deleted={deleted} />;
}

function Gone({ name, deleted }: { name: string; deleted: boolean }) {
  return (
    <Page title={name}>
      <Empty title={deleted ? "The adapter is deleted." : "There is no adapter of this name."}>
        Back to <a href={link("adapters")}>all adapters</a>.
      </Empty>
    </Page>
  );
}

interface Recorded {
  adapter: Adapter;
  versions: AdapterVersion[] | null;
  refresh: () => void;
  deleted: Signal<boolean>;
}

function Record({ adapter, versions, refresh, deleted }: Recorded) {
  const failure = useSignal<ApiError | null>(null);
  const files = useSignal<Chosen | null>(null);
  const deleting = useSignal(false);
  const act = async (...action: string[]) => {
    failure.value = null;
    try {
      await call(adapterPath(adapter.name, ...action), { method: "POST" });
    } catch (error) {
      failure.value = error as ApiError;
    }
    refresh();
  };
  const drop = async (event: DragEvent) => {
    event.preventDefault();
    files.value = await dropped(event.dataTransfer!);
  };
  return (
    <div onDragOver={(event) => event.preventDefault()} onDrop={drop}>
      <Page
        title={adapter.name}
        lead={
          <>
            <StateTag state={adapter.state} /> <TierTag tier={adapter.tier} /> <code>{short(adapter.version)}</code>
          </>
        }
        tools={
          <>
            <a class="button primary" href={link("playground", adapter.name)}>
              Try it
            </a>
            <button type="button" onClick={async () => (files.value = await chooseFiles())}>
              New version…
            </button>
            <button type="button" class="danger" onClick={() => (deleting.value = true)}>
              Delete…
            </button>
          </>
        }
      >
        {adapter.description && <p class="description">{adapter.description}</p>}
        {adapter.error && <Notice kind="bad">{adapter.error}</Notice>}
        <Failure error={failure.value} />
        <dl class="headline small">
          <Fact name="In flight">{count(adapter.in_flight)}</Fact>
          <Fact name="Tokens per second">{rate(adapter.traffic && adapter.traffic.tokens_per_second >= 0.05 ? adapter.traffic.tokens_per_second : 0)}</Fact>
          <Fact name="Requests">{count(adapter.traffic?.requests ?? 0)}</Fact>
          <Fact name="Tokens written">{count(adapter.traffic?.generated_tokens ?? 0)}</Fact>
          <Fact name="Last used">{ago(adapter.last_used)}</Fact>
        </dl>
        <div class="two">
          <section class="card">
            <h2>Versions</h2>
            {versions === null ? <Loading /> : <Versions name={adapter.name} versions={versions} refresh={refresh} />}
          </section>
          <section class="card">
            <h2>This version</h2>
            <dl class="facts">
              <Line name="rank">{adapter.rank ?? DASH}</Line>
              <Line name="size">{bytes(adapter.bytes)}</Line>
              <Line name="modules">{adapter.target_modules.join(", ") || DASH}</Line>
              <Line name="source">{adapter.source}</Line>
              <Line name="published">{moment(adapter.created)}</Line>
              {flat(adapter.labels).map(([name, value]) => (
                <Line key={name} name={`label ${name}`}>
                  {value}
                </Line>
              ))}
              {flat(adapter.defaults).map(([name, value]) => (
                <Line key={name} name={`default ${name}`}>
                  {value}
                </Line>
              ))}
              <Line name="model name">
                <code>{`${adapter.name}@${short(adapter.version)}`}</code> <Copy text={() => `${adapter.name}@${short(adapter.version)}`}>Copy</Copy>
              </Line>
            </dl>
            <div class="row">
              <Switch on={adapter.pinned} label="pinned to the device" change={(on) => act(on ? "pin" : "unpin")} />
              {adapter.tier === "device" ? (
                <button type="button" class="quiet" onClick={() => act("unload")}>
                  Unload
                </button>
              ) : (
                <button type="button" class="quiet" onClick={() => act("load")}>
                  Load now
                </button>
              )}
            </div>
            <h3>Report</h3>
            <Facts report={adapter.report} />
          </section>
        </div>
      </Page>
      {files.value && (
        <Upload
          chosen={files.value}
          into={adapter.name}
          close={() => {
            files.value = null;
            refresh();
          }}
          done={() => {
            files.value = null;
            refresh();
          }}
        />
      )}
      {deleting.value && <Delete name={adapter.name} inFlight={adapter.in_flight} close={() => (deleting.value = false)} done={() => (deleted.value = true)} />}
    </div>
  );
}

function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>
        <span class="figure">{children}</span>
      </dd>
    </div>
  );
}

function Line({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}
