import type { ComponentChildren } from "preact";
import { useRef } from "preact/hooks";
import { call } from "../api";
import { DASH, ago, count, duration, percent, rate, seconds } from "../format";
import { usePoll } from "../poll";
import { link } from "../route";
import { may, version } from "../session";
import type { AdapterNumbers, History, Stats } from "../types";
import { Empty, Failure, Loading, Locked, Meter, Page, TierTag } from "../ui";
import { appended, last } from "./history";
import { Lanes } from "./lanes";
import { Plot } from "./plot";

const STATS_MS = 2000;
const HISTORY_MS = 5000;
const BUSIEST = 8;

export function Overview() {
  if (!may("observe")) {
    return (
      <Page title="Overview">
        <Locked need="observe" />
      </Page>
    );
  }
  return <Observed />;
}

function Observed() {
  const stats = usePoll((signal) => call<Stats>(`/v1/stats?limit=${BUSIEST}`, { signal }), STATS_MS);
  const known = useRef<History | null>(null);
  const history = usePoll(async (signal) => {
    const after = known.current?.time.at(-1) ?? 0;
    known.current = appended(known.current, await call<History>(`/v1/stats/history?after=${after}`, { signal }));
    return known.current;
  }, HISTORY_MS);
  const now = stats.data.value;
  if (now === null) {
    return (
      <Page title="Overview">
        <Failure error={stats.error.value} />
        <Loading rows={8} />
      </Page>
    );
  }
  return (
    <Page title={now.base_model} lead={<Lead stats={now} />}>
      <Headline stats={now} history={history.data.value} />
      <Lanes base={now.base_model} />
      <Plots history={history.data.value} limit={now.queue.limit} />
      <div class="two">
        <Busiest adapters={now.adapters} registered={now.registry.adapters} />
        <Memory stats={now} />
      </div>
    </Page>
  );
}

function Lead({ stats }: { stats: Stats }) {
  const engine = version.value?.engine ?? {};
  const parts = [engine.dtype, engine.quantization === "none" ? "" : engine.quantization, engine.device];
  return (
    <>
      {[...parts, `${count(stats.registry.adapters)} adapters`, `up ${duration(stats.uptime_seconds)}`].filter(Boolean).join(" · ")}
      {stats.engine.restarts > 0 && ` · engine restarted ${stats.engine.restarts}×`}
    </>
  );
}

function Headline({ stats, history }: { stats: Stats; history: History | null }) {
  const flowing = stats.adapters.reduce((sum, adapter) => sum + adapter.tokens_per_second, 0);
  const { kv_cache: kv, slots } = stats;
  const used = kv.blocks_total ? kv.blocks_used / kv.blocks_total : 0;
  const hits = kv.prefix_queries ? kv.prefix_hits / kv.prefix_queries : null;
  return (
    <dl class="headline">
      <Figure name="Tokens per second" value={rate(last(history?.tokens_per_second) ?? flowing)}>
        {history && `${rate(last(history.prompt_tokens_per_second) ?? 0)} in prompts`}
      </Figure>
      <Figure name="First token" value={seconds(last(history?.ttft_p50))}>
        p95 {seconds(last(history?.ttft_p95))}
      </Figure>
      <Figure name="Between tokens" value={seconds(last(history?.itl_p50))}>
        p95 {seconds(last(history?.itl_p95))}
      </Figure>
      <Figure name="Running" value={count(stats.queue.running)}>
        {stats.queue.waiting ? <b class="warn">{count(stats.queue.waiting)} waiting</b> : "none waiting"}
      </Figure>
      <Figure name="KV cache" value={percent(used)}>
        {hits === null ? DASH : `${percent(hits)} prefix hits`}
      </Figure>
      <Figure name="Adapter slots" value={count(slots.used)}>
        of {count(slots.total)}
        {slots.pinned > 0 && `, ${count(slots.pinned)} pinned`}
      </Figure>
    </dl>
  );
}

function Figure({ name, value, children }: { name: string; value: string; children?: ComponentChildren }) {
  const [number, unit] = value.split(" ");
  return (
    <div>
      <dt>{name}</dt>
      <dd>
        <span class="figure">
          {number}
          {unit && <small>{unit}</small>}
        </span>
        <span class="muted">{children}</span>
      </dd>
    </div>
  );
}

function Plots({ history, limit }: { history: History | null; limit: number }) {
  if (history === null) return <Loading rows={2} />;
  const time = history.time;
  return (
    <section aria-label="The last hour" class="plots">
      <Plot title="Tokens per second" unit={rate} time={time} lines={{ written: history.tokens_per_second, "in prompts": history.prompt_tokens_per_second }} />
      <Plot title="First token" unit={seconds} time={time} lines={{ p50: history.ttft_p50, p95: history.ttft_p95 }} />
      <Plot title="Between tokens" unit={seconds} time={time} lines={{ p50: history.itl_p50, p95: history.itl_p95 }} />
      <Plot title="Sequences" unit={count} time={time} lines={{ running: history.running, [`waiting of ${limit}`]: history.waiting }} />
      <Plot title="KV cache" unit={percent} time={time} lines={{ used: history.kv_cache_usage }} top={1} />
      <Plot title="Adapters in one step" unit={rate} time={time} lines={{ "95th percentile": history.batch_adapters }} />
    </section>
  );
}

function Busiest({ adapters, registered }: { adapters: AdapterNumbers[]; registered: number }) {
  const most = Math.max(...adapters.map((adapter) => adapter.tokens_per_second), 1);
  return (
    <section class="card">
      <h2>Busiest models</h2>
      {adapters.length === 0 ? (
        <Empty title="No request so far">
          Ask one of {count(registered)} adapters something in the <a href={link("playground")}>playground</a>.
        </Empty>
      ) : (
        <div class="scroll" tabIndex={0} role="region" aria-label="Busiest models">
          <table>
            <thead>
              <tr>
                <th scope="col">model</th>
                <th scope="col">tier</th>
                <th scope="col" class="number">in flight</th>
                <th scope="col" class="wide">tokens/s</th>
                <th scope="col" class="number">requests</th>
                <th scope="col" class="number">last</th>
              </tr>
            </thead>
            <tbody>
              {adapters.map((adapter) => (
                <tr key={adapter.name}>
                  <th scope="row">
                    <a href={adapter.name === version.value?.base_model ? link("playground") : link("adapters", adapter.name)}>{adapter.name}</a>
                  </th>
                  <td>
                    <TierTag tier={adapter.tier} />
                  </td>
                  <td class="number">{count(adapter.in_flight)}</td>
                  <td class="wide">
                    <span class="bar">
                      <i style={{ width: `${(adapter.tokens_per_second / most) * 100}%` }} />
                      <span>{rate(adapter.tokens_per_second < 0.05 ? 0 : adapter.tokens_per_second)}</span>
                    </span>
                  </td>
                  <td class="number">{count(adapter.requests)}</td>
                  <td class="number muted">{ago(adapter.last_used)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  );
}

function Memory({ stats }: { stats: Stats }) {
  const { slots, tiers, registry, kv_cache: kv } = stats;
  const rows = [
    ["device", tiers.device, "compute at once"],
    ["host", tiers.host, "packed copies, one transfer away"],
    ["disk", registry.adapters, "stored in all"],
  ] as const;
  return (
    <section class="card">
      <h2>Where adapters are</h2>
      <div class="labelled">
        <span>Slots on the device</span>
        <span class="muted">
          {count(slots.used)} of {count(slots.total)}
        </span>
      </div>
      <Meter label="Slots on the device" value={slots.total ? slots.used / slots.total : 0} pinned={slots.total ? slots.pinned / slots.total : 0} />
      <ul class="tiers">
        {rows.map(([tier, number, what]) => (
          <li key={tier}>
            <TierTag tier={tier} />
            <span class="muted">{what}</span>
            <b>{count(number)}</b>
          </li>
        ))}
      </ul>
      <div class="labelled">
        <span>KV blocks</span>
        <span class="muted">
          {count(kv.blocks_used)} of {count(kv.blocks_total)}
          {kv.preemptions > 0 && `, ${count(kv.preemptions)} preemptions`}
        </span>
      </div>
      <Meter label="KV blocks" value={kv.blocks_total ? kv.blocks_used / kv.blocks_total : 0} />
      {(tiers.loading > 0 || tiers.failed > 0 || registry.damaged > 0) && (
        <p class="muted">
          {[tiers.loading && `${tiers.loading} loading`, tiers.failed && `${tiers.failed} failed`, registry.damaged && `${registry.damaged} damaged`].filter(Boolean).join(", ")}
        </p>
      )}
    </section>
  );
}

