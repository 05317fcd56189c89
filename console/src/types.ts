// The bodies of the routes that the console reads; /openapi.json describes them in full.

export type Tier = "device" | "host" | "disk";
export type State = "registered" | "loading" | "ready" | "failed" | "draining";
export type May = "infer" | "observe" | "admin" | "operate";
export type Report = Record<string, unknown>;

export interface Version {
  version: string;
  base_model: string;
  base_fingerprint: string | null;
  engine: Record<string, string>;
}

export interface AdapterNumbers {
  name: string;
  tier: Tier;
  in_flight: number;
  requests: number;
  prompt_tokens: number;
  generated_tokens: number;
  tokens_per_second: number;
  last_used: number | null;
}

export interface Stats {
  base_model: string;
  uptime_seconds: number;
  engine: { state: string; restarts: number; steps: number; step_seconds: number; batch_tokens: number; batch_adapters: number };
  queue: { running: number; waiting: number; limit: number };
  kv_cache: { blocks_used: number; blocks_total: number; prefix_queries: number; prefix_hits: number; preemptions: number };
  slots: { used: number; pinned: number; total: number };
  tiers: { device: number; host: number; loading: number; failed: number };
  registry: { adapters: number; damaged: number; set_aside: number };
  adapters: AdapterNumbers[];
}

type Column = (number | null)[];

export interface History {
  interval_seconds: number;
  time: number[];
  tokens_per_second: Column;
  prompt_tokens_per_second: Column;
  ttft_p50: Column;
  ttft_p95: Column;
  itl_p50: Column;
  itl_p95: Column;
  running: Column;
  waiting: Column;
  kv_cache_usage: Column;
  batch_adapters: Column;
}

export interface Adapter {
  name: string;
  kind: "adapter";
  version: string | null;
  state: State;
  tier: Tier;
  pinned: boolean;
  base_model: string;
  rank: number | null;
  target_modules: string[];
  bytes: number;
  source: string;
  created: number;
  last_used: number | null;
  in_flight: number;
  traffic: { requests: number; prompt_tokens: number; generated_tokens: number; tokens_per_second: number } | null;
  error: string | null;
  report: Report;
}

export interface Listed<T> {
  data: T[];
  has_more: boolean;
}

export interface AdapterVersion {
  version: string;
  created: number;
  current: boolean;
  rank: number | null;
  target_modules: string[] | null;
  bytes: number | null;
  report: Report | null;
}

export interface Alias {
  name: string;
  kind: "alias";
  weights: Record<string, number>;
  created: number;
}

export interface MergeStatus {
  state: "none" | "preparing" | "waiting" | "merged" | "leaving";
  adapter: string | null;
  version: string | null;
  asked_by: "request" | "policy" | null;
  requantized: boolean;
  policy: "off" | "auto";
  others: "wait" | "refuse";
}

export interface ApiKey {
  name: string;
  scopes: string[];
  tenant: string;
  adapters: string[] | null;
  weight: number;
  limits: { max_concurrent: number | null; requests_per_minute: number | null; tokens_per_minute: number | null };
  expires: number | null;
  expired: boolean;
}

export interface OwnKey {
  required: boolean;
  key: ApiKey | null;
  may: May[];
}
